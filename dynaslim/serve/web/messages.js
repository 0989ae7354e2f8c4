// What the page has to say: progress in a polite live region, trouble in an alert, and the token.

import { ApiError, token } from "./api.js";
import { byId } from "./dom.js";

const KEPT = "Your pictures are kept.";

export class Messages {
  /** `onRetry()` for "Try again"; `onToken()` when a token was typed in. */
  constructor({ onRetry, onToken }) {
    byId("retry").addEventListener("click", onRetry);
    byId("dismiss").addEventListener("click", () => this.clear());
    byId("token-form").addEventListener("submit", () => {
      token.set(byId("token").value.trim());
      byId("token").value = "";
      onToken();
    });
  }

  /** Something to know, in sight. */
  say(text) {
    byId("notice").textContent = text;
    byId("notice").hidden = text === "";
  }

  /** Something that is on the screen already, for those who do not see it. */
  announce(text) {
    byId("announcement").textContent = text;
  }

  /** The server asked for patience. */
  waiting(seconds, message) {
    const wait = Math.ceil(seconds);
    this.say(`The server is busy (${message}). Trying again in ${wait} s …`);
  }

  /** A wait that is over needs no notice. */
  settled() {
    if (byId("notice").textContent.startsWith("The server is busy")) this.say("");
  }

  /** Sending stopped; `kept` tells that there are pictures, which are not lost. */
  trouble(error, kept) {
    this.say("");
    if (error instanceof ApiError && error.status === 401) {
      byId("token-message").textContent = token.get()
        ? "The server did not accept this token."
        : "This server asks for a token.";
      if (!byId("token-dialog").open) byId("token-dialog").showModal();
      return;
    }
    byId("trouble").hidden = false;
    byId("alarm").textContent = `${capital(inWords(error))}${kept ? ` ${KEPT}` : ""}`;
  }

  /** Nothing is wrong any more. */
  clear() {
    this.say("");
    byId("trouble").hidden = true;
    byId("alarm").textContent = "";
  }
}

function inWords(error) {
  if (!(error instanceof ApiError)) return `Something went wrong: ${error.message}.`;
  if (error.code === "unreachable") return "The server does not answer. Is it running?";
  const text = error.message.replace(/\.$/, "");
  if (error.status === 429) return `The server is still busy: ${text}.`;
  return `${text}.`;
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
