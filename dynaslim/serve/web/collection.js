// The pictures on the page, and what is known of each.

/**
 * status: "waiting" to be sent, "done" (has a result), "failed" (has an error) or "held" (sending
 * was cancelled). A picture that waits once more, for another budget, keeps its older result.
 */
class Picture {
  static #count = 0;

  constructor({ name, blob, sample = null }) {
    this.id = ++Picture.#count;
    this.name = name;
    this.sample = sample; // the address of the server's sample that it is
    this.blob = blob;
    this.url = URL.createObjectURL(blob); // revoked when the picture goes
    this.status = "waiting";
    this.result = null;
    this.error = null;
  }
}

/** The pictures in the order in which they came. */
export class Collection {
  pictures = [];

  /** Take in pictures ({name, blob, sample?}); returns what was made of them. */
  add(files) {
    const added = files.map((file) => new Picture(file));
    this.pictures.push(...added);
    return added;
  }

  /** Let go of a picture. */
  remove(picture) {
    URL.revokeObjectURL(picture.url);
    this.pictures = this.pictures.filter((one) => one !== picture);
  }

  /** Let go of all. */
  clear() {
    for (const picture of this.pictures) URL.revokeObjectURL(picture.url);
    this.pictures = [];
  }

  byId(id) {
    return this.pictures.find((picture) => picture.id === id) ?? null;
  }

  with(status) {
    return this.pictures.filter((picture) => picture.status === status);
  }

  /** Those with a result, be it for an older budget. */
  get answered() {
    return this.pictures.filter((picture) => picture.result && picture.status !== "failed");
  }
}

/** How pictures can be ordered. */
export const ORDERS = {
  cost: {
    label: "Cost",
    inWords: "the cheapest first",
    compare: (a, b) => a.result.madds - b.result.madds,
  },
  confidence: {
    label: "Confidence",
    inWords: "the least sure first",
    compare: (a, b) => a.result.top[0].probability - b.result.top[0].probability,
  },
  name: { label: "Name", inWords: "by name", compare: byName },
};

/** Pictures with a result in one of `ORDERS`; of equals the one that came first. */
export function sorted(pictures, order) {
  return pictures.toSorted(ORDERS[order].compare);
}

function byName(a, b) {
  return a.name.localeCompare(b.name, undefined, { numeric: true });
}
