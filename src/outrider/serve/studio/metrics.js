// What /metrics says of the KV cache: the Prometheus text format, as far as it is needed here.

import { text } from "./api.js";

const NAMES = {
  kv: "vllm:kv_cache_usage_perc",
  hits: "vllm:prefix_cache_hits_total",
  queries: "vllm:prefix_cache_queries_total",
};

/** {kv, hit_rate}: shares of 1; null where the server does not say. */
export async function look() {
  const found = sums(await text("/metrics"));
  const hits = found.get(NAMES.hits);
  const queries = found.get(NAMES.queries);
  return { kv: found.get(NAMES.kv) ?? null, hit_rate: queries ? hits / queries : null };
}

/** Metric name -> sum over its labels. */
export function sums(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)/.exec(line);
    if (!match) continue;
    const value = Number(match[2].replace("+Inf", "Infinity"));
    if (!Number.isNaN(value)) found.set(match[1], (found.get(match[1]) ?? 0) + value);
  }
  return found;
}
