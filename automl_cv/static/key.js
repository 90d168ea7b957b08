// A service's API key: asked for once, kept until the tab is closed, sent with each request.
import { showOrigin } from "./origin.js";
import { isKey, keep, keyHeader } from "./service.js";

const [form, field, state] = ["key-form", "key", "key-state"].map((id) => document.getElementById(id));

// A browser cannot send a key when it follows a link, so a page that needs one is fetched with it.
async function unlock() {
  const reply = await fetch(location.href, { headers: { Accept: "text/html", ...keyHeader() } }).catch(() => null);
  if (!reply?.ok) {
    state.textContent =
      reply?.status === 401 ? "The service does not know this key." : "The service did not answer. Try again.";
    return;
  }
  const page = new DOMParser().parseFromString(await reply.text(), "text/html");
  document.title = page.title;
  document.getElementById("main").replaceWith(page.getElementById("main"));
  document.getElementById("main").focus(); // the field that had it is gone
  showOrigin();
}

function use() {
  state.textContent = "The key is sent with each request until you close this tab.";
  if (document.getElementById("locked")) unlock();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const key = field.value.trim();
  if (!isKey(key)) {
    state.textContent = "This key holds a character that no key can have, like a curly quotation mark. Copy it again.";
    return;
  }
  keep(key);
  field.value = "";
  use();
});
if ("X-API-Key" in keyHeader()) use();
