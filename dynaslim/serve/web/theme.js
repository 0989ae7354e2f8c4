// Runs before the page is painted: the chosen theme, if any, else what the system prefers.
// A classic script, as a module would come too late.
(() => {
  const root = document.documentElement;
  const stored = () => {
    try {
      return localStorage.getItem("dynaslim-theme");
    } catch {
      return null; // storage may be forbidden; the choice then lasts as long as the page
    }
  };
  const dark = () =>
    (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "")) ===
    "dark";

  const chosen = stored();
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;

  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const label = () => {
      const text = dark() ? "Light theme" : "Dark theme";
      button.setAttribute("aria-label", text);
      button.title = text;
    };
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      label();
      try {
        localStorage.setItem("dynaslim-theme", root.dataset.theme);
      } catch {
        // as above
      }
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
    label();
  });
})();
