"use strict";
const narrow = matchMedia("(max-width: 600px)"), dark = matchMedia("(prefers-color-scheme: dark)");

// Plotly's colours are those of the page, and follow its change between light and dark.
function template() {
  const style = getComputedStyle(document.documentElement), color = name => style.getPropertyValue(name).trim();
  const axis = {gridcolor: color("--line"), linecolor: color("--line"), zeroline: false, automargin: true,
    title: {standoff: 8, font: {size: 12}}};
  return {layout: {
    font: {family: "system-ui, sans-serif", size: 12, color: color("--ink")},
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis, hovermode: "closest",
    hoverlabel: {align: "left", bgcolor: color("--box"), bordercolor: color("--line"), font: {color: color("--ink")}},
    legend: {orientation: "h", yanchor: "bottom", y: 1.02, x: 0, font: {size: narrow.matches ? 11 : 12}},
  }};
}

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), letter => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

async function draw() {
  const plots = document.querySelectorAll(".plot");
  if (!plots.length) return;
  const script = document.createElement("script");
  script.textContent = await unpacked("plotly");
  document.head.append(script);
  const figures = JSON.parse(await unpacked("figures"));
  for (const plot of plots) {
    const figure = figures[Number(plot.dataset.figure)];
    // A finger that drags over a plot scrolls the page.
    const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
    plot.textContent = "";
    await Plotly.newPlot(plot, figure.data, {...figure.layout, dragmode, template: template()},
      {responsive: true, displayModeBar: false});
  }
  dark.addEventListener("change", () => plots.forEach(plot => Plotly.relayout(plot, {template: template()})));
}

draw().catch(error => document.querySelectorAll(".plot").forEach(plot => {
  if (!plot.data) plot.textContent = "This figure needs a current browser (" + error + ").";
}));

document.querySelectorAll("table.sortable").forEach(table => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent;
    const compare = (a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");  // empty cells last, either way
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }));
});
