// Draws SVG faces to PNG. Usage: node third_party.mjs jobs.json, run in a folder with the packages of third_party_sets.py.
// A job is {out, icons, names} (first name the Iconify file knows) or {out, avatar, options}.
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(join(process.cwd(), "package.json"));
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
const { Resvg } = require("@resvg/resvg-js");
const jobs = JSON.parse(readFileSync(process.argv[2], "utf8"));
const avatar = jobs.some((j) => j.avatar) ? (await load("@dicebear/core")).createAvatar : null;

async function svg(job) {
  if (job.avatar) return avatar(await load(job.avatar), job.options).toString();
  const set = JSON.parse(readFileSync(join("node_modules", job.icons, "icons.json"), "utf8"));
  for (const name of job.names) {
    const parent = set.aliases?.[name]?.parent ?? name;
    const icon = set.icons[parent];
    if (icon) {
      const w = icon.width ?? set.width ?? 16, h = icon.height ?? set.height ?? 16;
      return `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 ${w} ${h}">${icon.body}</svg>`;
    }
  }
  return null;
}

for (const job of jobs) {
  const text = await svg(job);
  if (text === null) { console.error("missing", job.icons, job.names.join(" ")); continue; }
  mkdirSync(dirname(job.out), { recursive: true });
  writeFileSync(job.out, new Resvg(text, { fitTo: { mode: "width", value: 128 } }).render().asPng());
}
