"""The style sheet of the HTML report, for light and dark screens."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --dim: #5d6b7a; --page: #f5f7f9; --card: #fff; --line: #dde3e9;
  --bar: #3d7ea6; --track: #e8edf2; --beyond: #c8553d; --act: #b3261e; --know: #8a6100; --good: #2e7d46;
  --shared: #e3eef6; --chosen: #e5f3e8; --rejected: #fae9e6; --other: #f3eedd; --shade: rgba(0,0,0,.07); }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --dim: #9aa7b5; --page: #12171d; --card: #1b222b;
  --line: #313c48; --bar: #5ba3cf; --track: #28313c; --beyond: #e27a63; --act: #ff8a80; --know: #e5b84b;
  --good: #76c893; --shared: #1d2f3d; --chosen: #1c3325; --rejected: #3d2522; --other: #35301f;
  --shade: rgba(255,255,255,.11); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "DejaVu Sans", sans-serif; }
main { max-width: 940px; margin: 0 auto; padding: 28px 18px 60px; }
h1 { font-size: 28px; margin: 0 0 6px; } h2 { font-size: 19px; margin: 0 0 2px; } main > h2 { margin: 22px 0 8px; }
h3 { font: 600 13px ui-monospace, "DejaVu Sans Mono", monospace; margin: 18px 0 6px; overflow-wrap: anywhere; }
h4 { font-size: 13px; margin: 0 0 2px; } small { color: var(--dim); font-weight: normal; }
.lead, .why, .remark { color: var(--dim); margin: 2px 0; overflow-wrap: anywhere; }
.remark { font-size: 14px; margin-top: 6px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 20px;
  margin-top: 18px; }
section > .why { margin-bottom: 12px; }
.verdicts { list-style: none; margin: 0; padding: 0; }
.verdicts li { display: flex; gap: 14px; background: var(--card); border: 1px solid var(--line); border-left: 5px solid;
  border-radius: 6px; padding: 7px 12px; margin-bottom: 6px; }
.verdicts b { flex: 0 0 118px; } .verdicts span { color: var(--ink); overflow-wrap: anywhere; }
.act { border-left-color: var(--act) !important; } .act b { color: var(--act); }
.know { border-left-color: var(--know) !important; } .know b { color: var(--know); }
.good { border-left-color: var(--good) !important; } .good b { color: var(--good); }
table { border-collapse: collapse; width: 100%; } .scroll { overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: 5px 10px 5px 0; border-top: 1px solid var(--line); }
.figures tr:first-child > * { border-top: 0; } .figures th { font-weight: normal; width: 38%; }
.figures .number { font-weight: 600; white-space: nowrap; width: 17%; } .out .number { color: var(--know); }
.figures td.why { font-size: 14px; } .examples { font: 12.5px ui-monospace, "DejaVu Sans Mono", monospace; }
.grid th { border-top: 0; color: var(--dim); font-weight: 600; } .grid { font-variant-numeric: tabular-nums; }
.grid th:not(:first-child), .grid td:not(:first-child) { text-align: right; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 14px 26px;
  margin-top: 14px; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 14px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font-size: 14px; } svg .small { fill: var(--dim); font-size: 12px; }
.bar { fill: var(--bar); } .beyond { fill: var(--beyond); } .track { fill: var(--track); }
.axis, .mark, .error { stroke: var(--ink); fill: none; } .mark { stroke-dasharray: 4 3; } .error { stroke-width: 1.5; }
.stretch { border-radius: 6px; padding: 6px 10px; margin-top: 5px; } .shared { background: var(--shared); }
.chosen { background: var(--chosen); } .rejected { background: var(--rejected); } .other { background: var(--other); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.55 ui-monospace, "DejaVu Sans Mono",
  monospace; }
.b { background: var(--shade); border-radius: 2px; } .newline, .hidden { color: var(--dim); font-style: normal; }
.special { outline: 1px solid var(--dim); outline-offset: -1px; border-radius: 3px; color: var(--know);
  padding: 0 2px; }
@media (max-width: 620px) { .verdicts li { display: block; } .charts { grid-template-columns: 1fr; } }
"""
