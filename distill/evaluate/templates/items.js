
(() => {
  const STEP = 20;
  const [DOC_ID, PROMPT, CHOICES, TARGET, MARKS, TEXTS, RESPONSES] = [0, 1, 2, 3, 4, 5, 6];
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("item-data").textContent);
  const [a, b, task] = ["model-a", "model-b", "item-task"].map(byId);
  const list = byId("item-list");
  const more = byId("more");
  let waiting = [];

  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  // The question, as a rule: the last line that says something, past a closing "Answer:".
  const gist = (text) => {
    const lines = text.trim().split("\n").map((line) => line.trim());
    return lines.findLast((line) => line.length > 20) ?? lines.at(-1);
  };
  const response = (item, model) => item[TEXTS][item[RESPONSES][model]];

  const choices = (item) => {
    const shown = make("ol");
    for (const choice of item[CHOICES]) {
      const line = make("li", choice);
      if (choice.trim() === item[TARGET].trim()) line.append(make("span", "target", "tag"));
      for (const model of [a, b]) {
        if (choice === response(item, model.value)) line.append(answerTag(item, model));
      }
      shown.append(line);
    }
    return shown;
  };
  const answerTag = (item, model, name = data.models[model.value]) => {
    const isRight = item[MARKS][model.value] === "1";
    return make("span", `${isRight ? "✓" : "✗"} ${name}`, `tag ${isRight ? "right" : "wrong"}`);
  };
  const verdict = (item, model) =>
    answerTag(item, model, item[MARKS][model.value] === "1" ? "right" : "wrong");
  const pair = (name, text, tag) => {
    const row = make("div");
    row.append(make("dt", name), make("dd", text));
    if (tag) row.lastChild.append(" ", tag);
    return row;
  };
  const body = (item) => {
    const shown = make("div", undefined, "body");
    const texts = make("dl");
    shown.append(make("pre", item[PROMPT]));
    if (item[CHOICES]) shown.append(choices(item));
    texts.append(pair("Target", item[TARGET]));
    for (const model of [a, b]) {
      const name = data.models[model.value];
      texts.append(pair(name, response(item, model.value), verdict(item, model)));
    }
    shown.append(texts);
    return shown;
  };
  const entry = (item) => {
    const shown = make("details");
    const head = make("summary");
    head.append(make("span", `#${item[DOC_ID]}`, "muted"), make("span", gist(item[PROMPT])));
    shown.append(head);
    shown.addEventListener("toggle", () => shown.append(body(item)), { once: true });
    return shown;
  };
  const addMore = () => {
    list.append(...waiting.splice(0, STEP).map(entry));
    more.hidden = waiting.length === 0;
  };

  const update = () => {
    const chosen = data.tasks[task.value];
    const counts = { a: chosen.wins[a.value][b.value], b: chosen.wins[b.value][a.value] };
    const side = document.querySelector("input[name=side]:checked").value;
    const [winner, loser] = side === "a" ? [a.value, b.value] : [b.value, a.value];
    waiting = chosen.items.filter(
      (item) => item[MARKS][winner] === "1" && item[MARKS][loser] === "0",
    );
    for (const key of ["a", "b"]) byId(`count-${key}`).textContent = `(${counts[key]})`;
    const missing = counts[side] - waiting.length;
    const names = `only ${data.models[winner]}, not ${data.models[loser]}`;
    byId("item-status").textContent =
      a.value === b.value
        ? "Choose two different models."
        : `${waiting.length} items of ${chosen.name} that ${names}, answers right (${chosen.metric})` +
          (missing ? `; ${missing} more were left out of this page.` : ".");
    list.replaceChildren();
    addMore();
  };

  data.tasks.forEach((one, number) => task.append(new Option(one.name, number)));
  for (const control of [a, b, task, ...document.querySelectorAll("input[name=side]")]) {
    control.addEventListener("change", update);
  }
  more.addEventListener("click", () => {
    const first = list.children.length;
    addMore();
    list.children[first].querySelector("summary").focus();
  });
  // From the details of a difference to the items behind it.
  for (const link of document.querySelectorAll(".see")) {
    link.addEventListener("click", () => {
      a.value = data.models.indexOf(link.dataset.a);
      b.value = data.models.indexOf(link.dataset.b);
      document.querySelector("input[name=side][value=a]").checked = true;
      task.value = data.tasks.findIndex((one) => one.name === link.dataset.task);
      update();
      link.closest(".card").hidePopover();
    });
  }
  update();
})();
