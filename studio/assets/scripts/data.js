// Folders on the Data page. Uploads keep a file's name and not its folder, so the way there is written into the name
// ("cats_,_one.png"), and read out of it again by the server (studio/dataset_files.py).
const studioFolded = "_,_";
const studioNamed = (file, path) =>
  new File([file], path.replace(/^\/+/, "").split("/").join(studioFolded), { type: file.type, lastModified: file.lastModified });
const studioHand = (input, files) => {
  const carrier = new DataTransfer();
  files.forEach((file) => carrier.items.add(file));
  input.files = carrier.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
};

// All files of a folder that was dropped, with the way to each; what systems leave in folders stays there.
const studioWalk = async (entry, found) => {
  if (entry.name.startsWith(".") || entry.name === "__MACOSX") return;
  if (entry.isFile) {
    const file = await new Promise((done, fail) => entry.file(done, fail));
    found.push(studioNamed(file, entry.fullPath));
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    // A reader gives a hundred at a time, and nothing at the end.
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) return;
    for (const one of some) await studioWalk(one, found);
  }
};

document.addEventListener("drop", (event) => {
  const zone = event.target.closest && event.target.closest("#data-file");
  const entries = [...((event.dataTransfer && event.dataTransfer.items) || [])].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
  if (!zone || !entries.some((entry) => entry.isDirectory)) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  const found = [];
  const input = zone.querySelector("input[type=file]");
  if (!input) return;
  (async () => {
    for (const entry of entries) await studioWalk(entry, found);
    if (found.length) studioHand(input, found);
  })();
}, true);

document.addEventListener("change", (event) => {
  const input = event.target;
  if (!input.matches || !input.matches("#data-folder ~ input[type=file], #data-folder input[type=file], input[type=file][webkitdirectory]")) return;
  const files = [...input.files];
  if (!files.some((file) => file.webkitRelativePath)) return;
  event.stopImmediatePropagation();
  studioHand(input, files.filter((file) => !file.name.startsWith(".")).map((file) => studioNamed(file, file.webkitRelativePath)));
}, true);
