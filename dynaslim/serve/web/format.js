// Numbers and names as a person reads them.

/** 0.4312 -> "43%"; small ones keep a digit, and nothing but 0 or 1 is called 0% or 100%. */
export function percent(share) {
  const value = share * 100;
  if (value > 0 && value < 0.1) return "<0.1%";
  if (value > 99.9 && value < 100) return ">99.9%";
  const fine = (value > 0 && value < 9.95) || (value > 99 && value < 100);
  return `${value.toFixed(fine ? 1 : 0)}%`;
}

/** 1250000 -> "1.25 M"; numbers that are compared keep one unit down to a hundredth of it. */
export function madds(count) {
  if (count >= 1e9) return `${digits(count / 1e9)}\u00a0G`;
  if (count >= 1e4) return `${digits(count / 1e6)}\u00a0M`;
  return count.toFixed(0);
}

/** What stands where times would, if the machine was too busy to measure them. */
export function untimed(model) {
  return model.steady ? "" : " No times: other work kept the machine busy when they were measured.";
}

/** 0.912 -> "0.91 ms". */
export function milliseconds(ms) {
  return `${ms < 0.1 ? ms.toPrecision(2) : digits(ms)}\u00a0ms`;
}

function digits(value) {
  return value.toFixed(value >= 100 ? 0 : value >= 10 ? 1 : 2);
}

/** 2400000 -> "2.4 MB". */
export function bytes(count) {
  return count < 1e6 ? `${Math.ceil(count / 1e3)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

/** "1 picture", "3 pictures". */
export function pictures(count) {
  return `${count} ${count === 1 ? "picture" : "pictures"}`;
}

/** What a class is called, also where the network does not know. */
export function className(answer) {
  return answer.class ?? `class ${answer.index}`;
}

/** The mean of numbers. */
export const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
