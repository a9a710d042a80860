// Runs before the page is drawn, so that a chosen theme does not flash. Storage may be forbidden.
document.documentElement.classList.add("js");
try {
  const chosen = localStorage.getItem("distill-theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
} catch (error) {
  console.info("The theme is not remembered:", error.message);
}
