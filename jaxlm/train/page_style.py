# SPDX-License-Identifier: Apache-2.0
"""How the report page looks: one column, system fonts, light or dark as the reader's system is."""

STYLE = """
:root { color-scheme: light dark;
  --ground: #ffffff; --text: #1c1f23; --faint: #5d646c; --line: #d9dde2; --card: #f6f7f9;
  --run0: #0072b2; --run1: #d55e00; --run2: #009e73; --run3: #b8578c; --run4: #b87a00; --run5: #2f94d0;
  --better: #00714f; --worse: #b04a00; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171b; --text: #e6e9ed; --faint: #9aa3ad; --line: #343a42; --card: #1c2026;
    --run0: #56b4e9; --run1: #f08a3c; --run2: #2fc79a; --run3: #e29cc4; --run4: #f0c04a; --run5: #8fa8ff;
    --better: #4fd1a5; --worse: #f0a060; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 6px; }
section { margin-top: 32px; }
ul.plain { list-style: none; margin: 6px 0; padding: 0; }
ul.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; position: sticky; top: 0; background: var(--ground);
  padding: 6px 0; border-bottom: 1px solid var(--line); }
.note { color: var(--faint); margin: 0 0 10px; }
section > svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 8px 0; }
th, td { padding: 4px 12px 4px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--faint); font-weight: 600; }
table.numbers td, table.numbers thead th[colspan] { white-space: nowrap; }
td.better { color: var(--better); } td.worse { color: var(--worse); }
code { font: 13px/1.4 ui-monospace, monospace; }
details { background: var(--card); border-radius: 6px; padding: 8px 12px; margin: 8px 0; overflow-x: auto; }
summary { cursor: pointer; }
"""

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main><h1>{title}</h1><ul class="plain">{facts}</ul><ul class="plain legend">{legend}</ul>
{body}</main></body></html>
"""
