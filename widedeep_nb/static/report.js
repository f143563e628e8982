// a link into a chapter opens the view that holds it
const findings = document.getElementById("view-findings");
const how = document.getElementById("view-how");

function openTarget() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  const isChapter = document.getElementById("how").contains(target);
  (isChapter ? how : findings).checked = true;
  target.scrollIntoView();
}

window.addEventListener("hashchange", openTarget);
openTarget();

for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const command = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
    } catch {
      // a page opened as a file may not write to the clipboard: select the text instead
      getSelection().selectAllChildren(command);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
