"""What the networks give: experiments, their numbers (`cells/`) and the page made of them."""
