// Shows the answers that the form asks for. Texts are read from the page and never made into markup.
const form = document.querySelector("#filter");
if (form) {
  const cards = [...document.querySelectorAll("article")];
  const words = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
  const count = document.querySelector("#count");
  const matches = (card, asked) =>
    (!asked.suite || card.dataset.suite === asked.suite) &&
    (!asked.outcome || card.dataset.outcome === asked.outcome) &&
    (!asked.base || card.dataset.base === asked.base) &&
    (!asked.changed || card.dataset.base !== card.dataset.outcome) &&
    (!asked.text || words.get(card).includes(asked.text.toLowerCase()));
  const show = () => {
    const asked = Object.fromEntries(new FormData(form));
    let shown = 0;
    for (const card of cards) {
      card.hidden = !matches(card, asked);
      shown += !card.hidden;
    }
    count.textContent = `${shown} of ${cards.length} answers`;
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(show));
  form.hidden = false;
  show();
}
