"use strict";

(() => {
  const byId = (id) => document.getElementById(id);

  // Theme: the system's until the button is pressed.
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const button = byId("theme");
  const showTheme = () => button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    showTheme();
    try {
      localStorage.setItem("distill-theme", root.dataset.theme);
    } catch (error) {
      console.info("The theme is not remembered:", error.message);
    }
  });
  system.addEventListener("change", showTheme);
  showTheme();

  // Sorting: first press in the column's own direction, then the other one, then as it was.
  const board = byId("board");
  const body = board.tBodies[0];
  const rows = [...body.rows];
  const heads = [...board.querySelectorAll(".heads th")];
  const other = { ascending: "descending", descending: "ascending" };

  const compare = (place, direction) => (left, right) => {
    const [a, b] = [left, right].map((row) => row.cells[place].dataset.sort);
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    const [x, y] = [Number(a), Number(b)];
    const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
    return direction === "ascending" ? order : -order;
  };

  heads.forEach((head, place) => {
    head.querySelector("button").addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const first = head.dataset.first;
      const now = before === null ? first : before === first ? other[first] : null;
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      if (now) head.setAttribute("aria-sort", now);
      body.append(...(now ? [...rows].sort(compare(place, now)) : rows));
    });
  });

  // Filters of rows.
  const find = byId("find");
  const role = byId("role");
  const filter = () => {
    const wanted = find.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const name = row.cells[0].querySelector(".name").textContent.toLowerCase();
      const fits = name.includes(wanted) && (!role.value || row.dataset.role === role.value);
      row.classList.toggle("hidden-row", !fits);
      shown += fits;
    }
    byId("shown").textContent = `${shown} of ${rows.length} models`;
    byId("none").hidden = shown > 0;
  };
  find.addEventListener("input", filter);
  role.addEventListener("change", filter);

  // Columns: one group or all, further metrics or the main ones. The first group always stays.
  const groups = [...board.querySelectorAll(".groups th")];
  const groupOf = groups.flatMap((group, number) => Array(group.colSpan).fill(number));
  const showColumns = () => {
    const chosen = byId("group")?.value ?? "";
    const all = byId("secondary")?.checked ?? true;
    const visible = groupOf.map((group, place) => {
      const isWanted = chosen === "" || group === 0 || group === Number(chosen);
      return isWanted && (all || !heads[place + 1].classList.contains("secondary"));
    });
    for (const row of [...rows, heads[0].parentElement]) {
      visible.forEach((is, place) => { row.cells[place + 1].hidden = !is; });
    }
    groups.forEach((group, number) => {
      const span = visible.filter((is, place) => is && groupOf[place] === number).length;
      group.hidden = span === 0;
      if (span) group.colSpan = span;
    });
  };
  byId("group")?.addEventListener("change", showColumns);
  byId("secondary")?.addEventListener("change", showColumns);
  showColumns();

  // Details of a mark open beside it where there is room; in the middle of a small screen.
  for (const card of document.querySelectorAll(".card")) {
    const mark = document.querySelector(`.mark[popovertarget="${card.id}"]`);
    card.addEventListener("toggle", (event) => {
      card.removeAttribute("style");
      if (!mark || event.newState !== "open" || innerWidth < 640) return;
      const place = mark.getBoundingClientRect();
      const left = Math.max(16, Math.min(place.left, innerWidth - card.offsetWidth - 16));
      const below = place.bottom + 8;
      const isRoomBelow = below + card.offsetHeight < innerHeight - 8;
      const top = isRoomBelow ? below : Math.max(8, place.top - card.offsetHeight - 8);
      Object.assign(card.style, {
        position: "absolute",
        margin: "0",
        left: `${left + scrollX}px`,
        top: `${top + scrollY}px`,
      });
    });
  }

  // Scatter plots: one task at a time.
  const task = byId("chart-task");
  if (task) {
    const show = () => {
      for (const grid of document.querySelectorAll("[data-chart-task]")) {
        grid.hidden = grid.dataset.chartTask !== task.value;
      }
    };
    task.addEventListener("change", show);
    show();
  }
})();
