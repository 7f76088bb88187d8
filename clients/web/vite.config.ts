import { defineConfig } from "vite";

export default defineConfig({
  // The page may lie in any folder of a web server.
  base: "./",
  build: {
    target: "es2022",
    // Files that a browser asks for by their address; inside the script they would need `data:`,
    // which the page's own policy forbids.
    assetsInlineLimit: 0,
    modulePreload: false,
  },
  worker: { format: "es" },
});
