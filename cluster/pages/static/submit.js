// What the server knows is asked for when somebody wants to see it: reading it takes a moment.
for (const fold of document.querySelectorAll("[data-known]")) {
  fold.addEventListener("toggle", async () => {
    const list = fold.querySelector("dl");
    if (!fold.open || list.childElementCount) return;
    const answer = await fetch(fold.dataset.known);
    if (!answer.ok) return;
    for (const { name, description, options } of await answer.json()) {
      const term = document.createElement("dt");
      term.textContent = name;
      const said = document.createElement("dd");
      const names = (options ?? []).map((option) => option.name).join(", ");
      said.textContent = names ? `${description} Options: ${names}.` : description;
      list.append(term, said);
    }
  });
}
