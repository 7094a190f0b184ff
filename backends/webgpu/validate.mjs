// Validates WGSL modules with Tint (npm package "webgpu": Dawn's bindings) on the null backend; no GPU or driver is needed.
// Input (stdin): JSON {shaders: [{name, code, entry}]}. Output: JSON [{name, error}], one per rejected shader.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join } from "node:path";

const require = createRequire(join(process.argv[2], "package.json"));
const { pathToFileURL } = require("node:url");
const { create, globals } = await import(pathToFileURL(require.resolve("webgpu")).href);
Object.assign(globalThis, globals);
const gpu = create(["backend=null"]);
const adapter = await gpu.requestAdapter();
const device = await adapter.requestDevice();
const rejected = [];
for (const { name, code, entry } of JSON.parse(readFileSync(0, "utf8")).shaders) {
  device.pushErrorScope("validation");
  const module = device.createShaderModule({ code });
  const info = await module.getCompilationInfo();
  const messages = info.messages.filter((m) => m.type === "error").map((m) => `${m.lineNum}:${m.linePos} ${m.message}`);
  if (!messages.length) device.createComputePipeline({ layout: "auto", compute: { module, entryPoint: entry } });
  const error = await device.popErrorScope();
  if (error && !messages.length) messages.push(error.message);
  if (messages.length) rejected.push({ name, error: messages.join("; ") });
}
process.stdout.write(JSON.stringify(rejected), () => process.exit(0));
