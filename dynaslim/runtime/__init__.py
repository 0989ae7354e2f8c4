"""Routed inference. Import each module by name: some of them do not need torch."""
