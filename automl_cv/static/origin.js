// Behind a proxy only the browser knows the address that people see.

/** Write the service's address into the lines for programs. */
export function showOrigin() {
  const base = new URL(".", location.href).href.replace(/\/$/, "");
  for (const spot of document.querySelectorAll(".origin")) spot.textContent = base;
}

showOrigin();
