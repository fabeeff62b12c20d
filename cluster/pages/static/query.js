const sql = document.getElementById("sql");
const told = document.getElementById("told");

if (sql) {
  document.addEventListener("click", async ({ target }) => {
    const button = target.closest("button");
    if (!button) return;
    if (button.dataset.sql) sql.value = button.dataset.sql;
    if (button.dataset.insert) {
      sql.setRangeText(button.dataset.insert, sql.selectionStart, sql.selectionEnd, "end");
      sql.focus();
    }
    if (button.dataset.download) await download(button.dataset.download);
  });
  sql.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) sql.form.requestSubmit();
  });
  document.getElementById("answer")?.focus();
}

const download = async (format) => {
  told.textContent = "The answer is being written…";
  const answer = await fetch("/v1/query", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-CSRF-Token": sql.form.elements.csrf.value },
    body: JSON.stringify({ sql: sql.value, format }),
  });
  if (!answer.ok) {
    told.textContent = (await answer.json()).detail;
    return;
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = `answer.${format}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  told.textContent = "";
};
