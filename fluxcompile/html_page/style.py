"""The page's style and script. Both are inside of it: the page asks nobody for anything."""

from fluxcompile.html_page.markup import Markup

#: nothing may be loaded, whatever a text in the page says
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

CSS = Markup("""
:root { --ground: #f8fafc; --card: #ffffff; --ink: #0f172a; --quiet: #475569; --line: #cbd5e1;
  --full: #334155; --sparse: #10b981; --pale: #cbd5e1; --marked: #f59e0b; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --ground: #0f172a; --card: #1e293b; --ink: #f1f5f9;
  --quiet: #94a3b8; --line: #475569; --full: #cbd5e1; --sparse: #34d399; --pale: #475569 } }
body { margin: 0 auto; padding: 24px; max-width: 1200px; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 24px; margin: 0 0 8px } h2 { font-size: 17px; margin: 0 0 4px }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px; margin: 16px 0; overflow-x: auto }
p { margin: 4px 0 12px; color: var(--quiet) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 8px 0 }
dt { color: var(--quiet) } dd { margin: 0 }
table { border-collapse: collapse; width: 100%; font-size: 13px }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--line);
  vertical-align: top }
th { color: var(--quiet); font-weight: 600 } td.number { text-align: right; white-space: nowrap }
svg { display: block } svg text { font: 11px system-ui, sans-serif; fill: var(--quiet) }
.full { fill: var(--full) } .sparse { fill: var(--sparse) } .pale { fill: var(--pale) }
.axis { stroke: var(--line) } [data-layer].marked { background: color-mix(in srgb,
  var(--marked) 25%, transparent) } rect.marked { stroke: var(--marked); stroke-width: 2 }
.legend span { display: inline-block; margin-right: 18px; color: var(--quiet); font-size: 13px }
.legend i { display: inline-block; width: 12px; height: 12px; margin-right: 6px;
  border-radius: 2px; vertical-align: -1px }
i.full { background: var(--full) } i.sparse { background: var(--sparse) }
i.pale { background: var(--pale) }
""")

#: marks a layer in every picture and in the table while the pointer is on it in one of them
SCRIPT = Markup("""
document.addEventListener("pointerover", event => {
  const over = event.target.closest("[data-layer]");
  for (const each of document.querySelectorAll(".marked")) each.classList.remove("marked");
  if (!over) return;
  const same = `[data-layer="${over.dataset.layer}"]`;
  for (const each of document.querySelectorAll(same)) each.classList.add("marked");
});
""")
