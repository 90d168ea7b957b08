// How files get into a page: dropped anywhere on it, pasted, or chosen.

// As the service itself leaves out.
const SYSTEM = ["__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "#recycle", "@eadir", "icon\r"];

const hidden = (path) => path.split("/").some((part) => part.startsWith(".") || SYSTEM.includes(part.toLowerCase()));

async function walk(entry) {
  if (entry.isFile) {
    const file = await new Promise((done, fail) => entry.file(done, fail)).catch(() => null);
    return file ? [{ file, name: entry.fullPath.replace(/^\//, "") }] : [];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) { // a folder is read in parts of at most 100
    const part = await new Promise((done, fail) => reader.readEntries(done, fail)).catch(() => []);
    if (!part.length) return found;
    for (const child of part) {
      for (const file of await walk(child)) found.push(file); // spread, a hundred thousand would be too many
    }
  }
}

async function unpack(data) {
  const entries = [...data.items].map((item) => item.webkitGetAsEntry?.()); // gone after the first await
  const files = [...data.files];
  if (!entries.some((entry) => entry?.isDirectory)) return named(files);
  return (await Promise.all(entries.filter(Boolean).map(walk))).flat();
}

/** Give files the names that a person knows them by: within a folder, the path. */
export const named = (files) => [...files].map((file) => ({ file, name: file.webkitRelativePath || file.name }));

/** Leave out what operating systems put into folders by themselves. */
export const visible = (items) => items.filter(({ name }) => !hidden(name));

/**
 * Take files from the whole page, so that nobody can miss, and the browser never leaves the page for a file.
 * `take` gets a list of {file, name}.
 */
export function takeFiles(zone, take) {
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    zone.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) zone.classList.remove("over");
  });
  document.addEventListener("drop", async (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    take(await unpack(event.dataTransfer));
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) take(named(event.clipboardData.files));
  });
}

/** Take files from an input. */
export function takeChosen(input, take) {
  input.addEventListener("change", () => {
    const items = named(input.files);
    input.value = ""; // the same file may be chosen again
    if (items.length) take(items);
  });
}
