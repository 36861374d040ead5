// Presets of the picture's shape: the endpoint's own sizes, else usual ratios of about the area that it draws best.

const $ = (id) => document.getElementById(id);
const RATIOS = [[1, 1], [4, 3], [3, 2], [16, 9], [3, 4], [2, 3], [9, 16]];

/** The sizes [width, height] to choose from; `can` is what the endpoint can be asked. */
function sizes(can) {
  if (can.sizes?.length) return can.sizes;
  const { width, height, size_multiple: multiple, max_pixels: most } = can;
  const found = RATIOS.map(([x, y]) => {
    const scale = Math.sqrt((width * height) / (x * y));
    return [x, y].map((side) => Math.max(1, Math.round((side * scale) / multiple)) * multiple);
  });
  const unique = new Map(found.map((size) => [size.join(), size]));
  return [...unique.values()].filter(([w, h]) => w * h <= most);
}

/** Draws a button for each; `choose` takes (width, height). */
export function drawShapes(can, choose) {
  const list = sizes(can);
  $("shapes").hidden = list.length < 2;
  $("shapes").replaceChildren(...list.map(([width, height]) => {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "shape" });
    button.title = `${width} × ${height}`;
    button.setAttribute("aria-label", `${width} by ${height} pixels`);
    const icon = document.createElement("i");
    const longest = Math.max(width, height);
    icon.style.width = `${(18 * width) / longest}px`;
    icon.style.height = `${(18 * height) / longest}px`;
    button.append(icon);
    button.dataset.size = `${width}x${height}`;
    button.addEventListener("click", () => choose(width, height));
    return button;
  }));
}

/** Marks the preset that the form has now. */
export function markShape(width, height) {
  for (const button of $("shapes").children) {
    button.setAttribute("aria-pressed", String(button.dataset.size === `${width}x${height}`));
  }
}
