// Answers as a table for spreadsheets (RFC 4180).

// A spreadsheet runs a text that starts like this as a formula, and names of files come from strangers.
const safe = (text) => (/^[=+\-@\t\r\n]/.test(text) ? `'${text}` : text);

const quote = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

const line = (cells) => `${cells.map((cell) => quote(typeof cell === "string" ? safe(cell) : String(cell))).join(",")}\r\n`;

const OWN = ["file", "label", "confidence", "uncertain", "error"];

// As the service's own tables do it: of several labels all, and nothing where there is none.
const named = (found) => (found.labels ? found.labels.map((share) => share.label).join("|") : found.label);

const MARK = "\ufeff"; // without it Excel reads UTF-8 as something older, and spoils every umlaut

/** Write rows of {name, found} or {name, trouble}: file, label, confidence, one column per class, perhaps doubt, error. */
export function writeCsv(rows, classes, ranking) {
  const doubts = rows.some(({ found }) => found && "uncertain" in found);
  const columns = classes.map((label) => (OWN.includes(label) ? `class ${label}` : label));
  const head = line(["file", "label", "confidence", ...columns, ...(doubts ? ["uncertain"] : []), "error"]);
  const body = rows.map(({ name, found, trouble }) => {
    const shares = new Map((found ? ranking(found) : []).map((share) => [share.label, share.probability]));
    const figures = classes.map((label) => shares.get(label) ?? "");
    const doubt = doubts ? [found?.reason ?? ""] : [];
    return line([name, found ? named(found) : "", found?.confidence ?? "", ...figures, ...doubt, trouble?.code ?? ""]);
  });
  return MARK + head + body.join("");
}

/** Let the browser save a text as a file. */
export function save(text, name, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000); // a browser may start the download later
}
