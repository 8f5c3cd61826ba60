// What the page does by itself: cues where a part scrolls sideways, marks that speak when tapped. Loads nothing.
(() => {
  const cue = (part) => part.parentElement.classList.toggle(
    'nr-more', part.scrollWidth - part.clientWidth - part.scrollLeft > 4);
  const known = new WeakSet();
  const sizes = new ResizeObserver((seen) => seen.forEach((entry) => cue(entry.target)));
  const adopt = (part) => {
    if (known.has(part)) return;
    known.add(part);
    if (part.dataset.from) part.scrollLeft = Number(part.dataset.from);
    part.addEventListener('scroll', () => cue(part), { passive: true });
    sizes.observe(part);
    if (part.firstElementChild) sizes.observe(part.firstElementChild);
    cue(part);
  };
  new MutationObserver(() => document.querySelectorAll('.nr-scroll').forEach(adopt))
    .observe(document.documentElement, { subtree: true, childList: true });

  const REACH = 24; // pixels between a finger and the mark that it means
  document.addEventListener('click', (event) => {
    const chart = event.target.closest?.('.nr-told');
    const line = chart?.querySelector('.nr-tell');
    if (!line || event.target.closest('button, summary, a')) return;
    let best = null, least = REACH;
    for (const mark of chart.querySelectorAll('[data-says]')) {
      const box = mark.getBoundingClientRect();
      const dx = Math.max(box.left - event.clientX, 0, event.clientX - box.right);
      const dy = Math.max(box.top - event.clientY, 0, event.clientY - box.bottom);
      const far = Math.hypot(dx, dy);
      if (far < least || (far === least && best === null)) [best, least] = [mark, far];
    }
    chart.querySelectorAll('.nr-on').forEach((mark) => mark.classList.remove('nr-on'));
    if (!best) return;
    best.classList.add('nr-on');
    const said = best.getAttribute('title') || best.querySelector('title')?.textContent || '';
    line.textContent = said.replaceAll('\n', ', ');
  });
})();
