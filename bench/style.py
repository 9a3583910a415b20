"""The look of report.html. Colours are variables with a light and a dark value."""

CSS = """
:root {
  --page: #ffffff; --ink: #1d2129; --muted: #667085; --line: #e4e7ec; --soft: #f6f7f9;
  --accent: #17806d; --good: #17806d; --bad: #c0362c; --warn: #fff6e5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #171a21; --ink: #e6e9ef; --muted: #98a2b3; --line: #2f3542; --soft: #1f232c;
    --accent: #3cc7ad; --good: #3cc7ad; --bad: #ff8a80; --warn: #33291a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1200px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 21px; margin: 52px 0 6px; padding-top: 20px; border-top: 1px solid var(--line); }
h3 { font-size: 16px; margin: 30px 0 0; }
h3 span { color: var(--muted); font-weight: 400; }
p { margin: 8px 0; max-width: 76ch; }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.kicker { color: var(--accent); font-weight: 600; margin: 0; }
.muted { color: var(--muted); font-size: 13px; }
.warning, .notes { background: var(--warn); border-radius: 8px; padding: 10px 14px; max-width: none; }
.notes { list-style: none; font-size: 14px; margin: 14px 0; }
.notes li + li { margin-top: 6px; }
.facts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); border-radius: 8px;
  overflow: hidden; margin: 20px 0; border: 1px solid var(--line);
}
.facts div { padding: 10px 14px; box-shadow: 1px 1px 0 var(--line); }
.facts dt { color: var(--muted); font-size: 12px; }
.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.headlines { list-style: none; padding: 0; margin: 20px 0; display: grid; gap: 10px; }
.headlines li {
  border-left: 4px solid var(--accent); background: var(--soft); padding: 12px 16px;
  border-radius: 0 8px 8px 0; font-size: 16px;
}
figure { margin: 20px 0 28px; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--muted); font-size: 13px; margin-top: 4px; }
.scroll { overflow-x: auto; }
table {
  border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums;
  margin: 8px 0;
}
th, td { padding: 6px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { color: var(--muted); font-weight: 500; font-size: 12.5px; }
th:first-child { text-align: left; font-weight: 400; }
tr.ours th:first-child { font-weight: 650; }
tbody tr:hover { background: var(--soft); }
td.faster, .improvement { color: var(--good); }
td.slower, .regression { color: var(--bad); }
td.same { color: var(--muted); }
.goals th, .goals td { white-space: normal; }
tr.bad td { text-align: left; color: var(--bad); white-space: normal; }
.changes { padding-left: 20px; font-size: 14px; }
details { margin: 12px 0; }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--soft); padding: 14px; border-radius: 8px; overflow-x: auto; }
"""
