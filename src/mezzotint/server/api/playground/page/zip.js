// A zip file of files that are compressed already: they are stored as they are.

const TABLE = Uint32Array.from({ length: 256 }, (_, at) => {
  let value = at;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

function crc(bytes) {
  let value = ~0;
  for (const byte of bytes) value = TABLE[(value ^ byte) & 255] ^ (value >>> 8);
  return ~value >>> 0;
}

/** Little-endian numbers, given as [bytes, value]. */
function numbers(...parts) {
  return Uint8Array.from(parts.flatMap(([size, value]) => Array.from({ length: size }, (_, at) => (value >>> (8 * at)) & 255)));
}

/** The Blob of a zip with these [name, bytes]; equal names get a number. */
export function zipOf(files) {
  const used = new Set();
  const pieces = [];
  const directory = [];
  let offset = 0;
  for (const [wanted, bytes] of files) {
    let name = wanted;
    for (let more = 2; used.has(name); more++) name = wanted.replace(/(\.[^.]*)?$/, `-${more}$1`);
    used.add(name);
    const title = new TextEncoder().encode(name);
    // version 2.0, names in UTF-8, stored, 1 January 1980
    const facts = numbers([2, 20], [2, 0x800], [2, 0], [2, 0], [2, 0x21], [4, crc(bytes)], [4, bytes.length], [4, bytes.length], [2, title.length], [2, 0]);
    pieces.push(numbers([4, 0x04034b50]), facts, title, bytes);
    directory.push(numbers([4, 0x02014b50], [2, 20]), facts, numbers([2, 0], [2, 0], [2, 0], [4, 0], [4, offset]), title);
    offset += 30 + title.length + bytes.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const end = numbers([4, 0x06054b50], [2, 0], [2, 0], [2, files.length], [2, files.length], [4, size], [4, offset], [2, 0]);
  return new Blob([...pieces, ...directory, end], { type: "application/zip" });
}
