"use strict";
(() => {
  const read = (id) => {
    const element = document.getElementById(id);
    return element ? JSON.parse(element.textContent) : null;
  };
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  // What cannot be seen, or would reorder its surroundings, is written out; nothing is ever set as markup.
  const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
  const visible = (text) =>
    String(text).replace(UNSEEN, (c) => `\u27e8U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}\u27e9`);
  const short = (value) =>
    typeof value === "number" ? String(Number(value.toPrecision(4))).replace("-", "\u2212") : "n/a";

  // Colours of the scheme, resolved by the browser, because plotly wants plain ones.
  const probe = document.body.appendChild(make("span"));
  probe.hidden = true;
  const colour = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };
  const dress = () => {
    const [ink, line, card] = ["--ink", "--line", "--card"].map(colour);
    const axis = { gridcolor: line, linecolor: line, tickcolor: line };
    return {
      "font.color": ink,
      "hoverlabel.bgcolor": card, "hoverlabel.bordercolor": line, "hoverlabel.font.color": ink,
      ...Object.fromEntries(["xaxis", "yaxis"].flatMap((a) => Object.entries(axis).map(([k, v]) => [`${a}.${k}`, v]))),
    };
  };
  const drawn = [];
  const repaint = () => {
    const look = dress();
    for (const plot of drawn) Plotly.relayout(plot, look);
  };
  const put = (layout, path, value) => {
    const keys = path.split(".");
    const last = keys.pop();
    keys.reduce((at, key) => (at[key] ??= {}), layout)[last] = value;
  };
  // plotly lies packed in the page, which halves it. What comes out runs only if its digest is the one that is allowed.
  const unpack = async () => {
    const packed = document.getElementById("plotly");
    const bytes = Uint8Array.from(atob(packed.textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const script = make("script", "", await new Response(stream).text());
    packed.remove();
    document.head.append(script);
  };
  const draw = async () => {
    await unpack();
    const config = { displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
    for (const place of document.querySelectorAll(".plot")) {
      const figure = read(place.dataset.figure);
      for (const [path, value] of Object.entries(dress())) put(figure.layout, path, value);
      await Plotly.newPlot(place, figure.data, figure.layout, config);
      drawn.push(place);
      // One plot at a time, so that the page answers while they are drawn.
      await new Promise((resolve) => setTimeout(resolve));
    }
    document.documentElement.dataset.drawn = String(drawn.length);
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", repaint);
  document.getElementById("scheme").addEventListener("click", () => {
    const style = document.documentElement.style;
    const now = style.colorScheme || (dark.matches ? "dark" : "light");
    style.colorScheme = now === "dark" ? "light" : "dark";
    repaint();
  });

  const browser = () => {
    const data = read("rollout-data");
    if (!data) return;
    const place = (name) => data.fields.indexOf(name);
    const [STEP, TASK, MEMBER, REWARD, CORRECT, STOP, ERROR, TOKENS, SKIPPED, ADVANTAGE, PLANNING, END] = [
      "step", "task", "member", "reward", "correct", "stop", "error", "tokens", "skipped", "advantage", "planning", "end",
    ].map(place);
    const form = document.getElementById("filters");
    const list = document.getElementById("rollout-list");
    const opened = document.getElementById("rollout-opened");
    const count = document.getElementById("rollout-count");
    const PAGE = 100;
    let found = [];
    let shown = 0;
    let current = -1;
    let view = "advantages";
    const searched = [];

    const body = (number) => read(`rollout-${number}`);
    const text = (number) => {
      if (searched[number] === undefined) {
        const it = body(number);
        searched[number] = [data.prompts[it.prompt], it.completion, it.reference].join("\n").toLowerCase();
      }
      return searched[number];
    };
    const verdict = (row) => (row[ERROR] ? "failed" : row[CORRECT] === null ? "" : row[CORRECT] ? "correct" : "wrong");

    const fill = (name, values) => {
      for (const value of values) {
        const option = make("option", "", visible(value));
        option.value = value;
        form.elements[name].append(option);
      }
    };
    const unique = (index) => [...new Set(data.rows.map((row) => row[index]).filter(Boolean))].sort();
    fill("stop", unique(STOP));
    fill("skipped", unique(SKIPPED));

    const bound = (name, fallback) => {
      const value = form.elements[name].value;
      return value === "" || Number.isNaN(Number(value)) ? fallback : Number(value);
    };
    const filter = () => {
      const is = Object.fromEntries(["verdict", "stop", "skipped"].map((n) => [n, form.elements[n].value]));
      const [from, to] = [bound("from", -Infinity), bound("to", Infinity)];
      const [least, most] = [bound("least", -Infinity), bound("most", Infinity)];
      const rewarded = least !== -Infinity || most !== Infinity;
      const task = form.elements.task.value.trim().toLowerCase();
      const words = form.elements.text.value.toLowerCase();
      found = [];
      data.rows.forEach((row, number) => {
        if (row[STEP] < from || row[STEP] > to) return;
        if (is.verdict && verdict(row) !== is.verdict) return;
        if (is.stop && row[STOP] !== is.stop) return;
        if (is.skipped && (is.skipped === "trained" ? row[SKIPPED] : row[SKIPPED] !== is.skipped)) return;
        if (rewarded && !(typeof row[REWARD] === "number" && row[REWARD] >= least && row[REWARD] <= most)) return;
        if (task && !row[TASK].toLowerCase().includes(task)) return;
        if (words && !text(number).includes(words)) return;
        found.push(number);
      });
      count.textContent = `${found.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} rollouts`;
      list.replaceChildren();
      shown = 0;
      more();
    };
    const entry = (number) => {
      const row = data.rows[number];
      const button = make("button");
      button.type = "button";
      button.dataset.number = number;
      button.setAttribute("aria-current", String(number === current));
      const what = make("span", "what");
      what.append(make("span", "", visible(`step ${row[STEP]}, ${row[TASK]} #${row[MEMBER]}`)));
      const right = make("span");
      right.append(make("span", verdict(row), verdict(row) || "unjudged"), ` ${short(row[REWARD])}`);
      what.append(right);
      const end = make("span", "end");
      const cut = row[STOP] === "length" ? ", cut" : "";
      end.append(make("span", "", visible(row[END])), make("span", "", `${row[TOKENS]} tokens${cut}`));
      button.append(what, end);
      const item = make("li");
      item.append(button);
      return item;
    };
    const more = () => {
      list.querySelector(".more")?.parentElement.remove();
      const next = found.slice(shown, shown + PAGE);
      list.append(...next.map(entry));
      shown += next.length;
      if (shown < found.length) {
        const button = make("button", "more", `Show ${Math.min(PAGE, found.length - shown)} more`);
        button.type = "button";
        const item = make("li");
        item.append(button);
        list.append(item);
      }
    };

    const fact = (dl, name, value, style) => {
      const pair = make("div");
      pair.append(make("dt", "", visible(name)), make("dd", style, visible(value)));
      dl.append(pair);
    };
    const block = (title, content, folded) => {
      const box = folded ? make("details") : make("div");
      box.append(folded ? make("summary", "", title) : make("h4", "", title), make("pre", "", visible(content)));
      return box;
    };
    const open = (number) => {
      const row = data.rows[number];
      const it = body(number);
      list.querySelector(`[data-number="${current}"]`)?.setAttribute("aria-current", "false");
      current = number;
      list.querySelector(`[data-number="${current}"]`)?.setAttribute("aria-current", "true");
      const numbers = make("dl", "numbers");
      fact(numbers, "Reward", short(row[REWARD]), verdict(row));
      if (verdict(row)) fact(numbers, "Verdict", verdict(row), verdict(row));
      for (const [name, value] of Object.entries(it.parts ?? {})) fact(numbers, name, short(value));
      fact(numbers, "Mean advantage", short(row[ADVANTAGE]));
      fact(numbers, "Group", row[SKIPPED] ? `not trained (${row[SKIPPED]})` : "trained");
      fact(numbers, "Ended by", row[STOP] || "n/a");
      fact(numbers, "Tokens", `${row[TOKENS]}, ${row[PLANNING]} planning`);
      if (it.weights_version !== null && it.weights_version !== undefined) fact(numbers, "Weights", `version ${it.weights_version}`);
      const parts = [make("h3", "", visible(`Step ${row[STEP]}, ${row[TASK]}, member ${row[MEMBER]}`)), numbers];
      if (it.error) parts.push(block("What failed", it.error));
      const prompt = data.prompts[it.prompt];
      parts.push(block("Prompt", prompt, prompt.length > 1500));
      if (it.reference !== null && it.reference !== undefined) parts.push(block("Reference", it.reference));
      if (it.credit && it.credit.texts.length) parts.push(tokens(it.credit), block("Completion as plain text", it.completion ?? "", true));
      else parts.push(block("Completion", it.completion ?? ""));
      opened.replaceChildren(...parts);
      opened.scrollTop = 0;
    };

    const VIEWS = {
      advantages: ["Advantage", ""],
      uncertainty: ["Uncertainty", " nats"],
      logprobs: ["Logprob", " nats"],
    };
    const tokens = (credit) => {
      const at = (name, i) => (Array.isArray(credit[name]) ? credit[name][i] : credit[name]) ?? null;
      const total = credit.texts.length;
      const planned = new Set(credit.planning);
      const real = (i) => (credit.gap && i >= credit.gap[0] ? i + credit.gap[1] : i);
      const most = (name) => {
        let top = 0;
        for (let i = 0; i < total; i++) top = Math.max(top, Math.abs(at(name, i) ?? 0));
        return top;
      };
      const top = { advantages: most("advantages"), uncertainty: most("uncertainty"), logprobs: Math.min(most("logprobs"), 10) };
      const named = { ...VIEWS, uncertainty: [`Uncertainty (${visible(credit.kind.replaceAll("_", " ") || "unnamed")})`,
        /variance/.test(credit.kind) ? "" : " nats"] };
      const paint = (name, value) => {
        if (value === null || !top[name]) return "";
        const strength = Math.min(Math.abs(value) / top[name], 1) * 0.55;
        if (strength < 0.005) return "";
        const base = name === "advantages" ? (value > 0 ? "59,130,246" : "232,113,10") : name === "uncertainty" ? "139,92,246" : "13,148,136";
        return `rgba(${base},${strength.toFixed(3)})`;
      };
      const box = make("div");
      const choice = make("fieldset", "switch");
      choice.append(make("legend", "", "Colour by"));
      for (const name of Object.keys(VIEWS)) {
        const label = make("label");
        const input = make("input");
        Object.assign(input, { type: "radio", name: "view", value: name, checked: name === view });
        label.append(input, ` ${named[name][0]}`);
        choice.append(label);
      }
      const legend = make("div", "legend");
      const readout = make("output", "readout", "Point at a token, or walk through them with the arrow keys.");
      readout.setAttribute("aria-live", "polite");
      const area = make("pre", "tokens");
      area.tabIndex = 0;
      area.setAttribute("role", "group");
      area.setAttribute("aria-label", "Completion by token; left and right arrow keys move, Home and End jump");
      const spans = credit.texts.map((raw, i) => {
        const seen = visible(raw).replaceAll("\n", "\u21b5\n");
        const span = make("span", "", seen || "\u00b7");
        if (!seen) span.classList.add("blank");
        if (planned.has(i)) span.classList.add("plan");
        span.dataset.i = i;
        return span;
      });
      const colourAll = () => {
        spans.forEach((span, i) => { span.style.backgroundColor = paint(view, at(view, i)); });
        const [name, unit] = named[view];
        const bar = make("span", "bar");
        const ends = view === "advantages" ? [-top[view], top[view]] : view === "logprobs" ? [0, -top[view]] : [0, top[view]];
        const sides = [paint(view, ends[0]) || "transparent", "transparent", paint(view, ends[1]) || "transparent"];
        bar.style.background = `linear-gradient(90deg, ${view === "advantages" ? sides.join(",") : `${sides[1]},${sides[2]}`})`;
        legend.replaceChildren(name, make("span", "", short(ends[0])), bar, make("span", "", `${short(ends[1])}${unit}, in this rollout`),
          make("span", "planned", "planning"));
      };
      let here = -1;
      const tell = (i) => {
        if (i < 0 || i >= total) return;
        spans[here]?.classList.remove("here");
        here = i;
        spans[i].classList.add("here");
        const lp = at("logprobs", i);
        const chance = lp === null ? "" : `, probability ${(100 * Math.exp(lp)).toPrecision(3)} %`;
        const kind = credit.kind.replaceAll("_", " ") || "uncertainty";
        readout.textContent = `Token ${real(i) + 1} of ${credit.count} \u201c${visible(credit.texts[i]).replaceAll("\n", "\u21b5")}\u201d: ` +
          `advantage ${short(at("advantages", i))}, ${visible(kind)} ${short(at("uncertainty", i))}, logprob ${short(lp)}${chance}` +
          (planned.has(i) ? ", planning" : "");
      };
      area.addEventListener("pointerover", (event) => {
        if (event.target.dataset.i !== undefined) tell(Number(event.target.dataset.i));
      });
      area.addEventListener("click", (event) => {
        if (event.target.dataset.i !== undefined) tell(Number(event.target.dataset.i));
      });
      area.addEventListener("focus", () => { if (here < 0) tell(0); });
      area.addEventListener("keydown", (event) => {
        const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: total - 1 }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        tell(to);
        spans[here]?.scrollIntoView({ block: "nearest" });
      });
      choice.addEventListener("change", (event) => {
        view = event.target.value;
        colourAll();
      });
      if (credit.gap) {
        area.append(...spans.slice(0, credit.gap[0]),
          make("span", "gap", `\n[${credit.gap[1].toLocaleString("en")} tokens left out; generations.jsonl has them]\n`), ...spans.slice(credit.gap[0]));
      } else area.append(...spans);
      colourAll();
      box.append(make("h4", "", "Completion, token by token"), choice, legend, readout, area);
      return box;
    };

    const move = (by) => {
      const at = found.indexOf(current);
      const to = at < 0 ? 0 : Math.max(0, Math.min(found.length - 1, at + by));
      if (found[to] === undefined) return;
      while (to >= shown && shown < found.length) more();
      open(found[to]);
      list.querySelector(`[data-number="${current}"]`)?.scrollIntoView({ block: "nearest" });
    };
    list.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      if (button.classList.contains("more")) more();
      else open(Number(button.dataset.number));
    });
    list.addEventListener("keydown", (event) => {
      const by = { ArrowDown: 1, ArrowUp: -1, Home: -found.length, End: found.length }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      move(by);
      list.querySelector(`[data-number="${current}"]`)?.focus();
    });
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
      if (event.key === "n") move(1);
      else if (event.key === "p") move(-1);
      else if (event.key === "/") {
        event.preventDefault();
        form.elements.text.focus();
      }
    });
    let waiting = 0;
    const soon = () => {
      clearTimeout(waiting);
      waiting = setTimeout(filter, 120);
    };
    form.addEventListener("input", soon);
    form.addEventListener("submit", (event) => { event.preventDefault(); filter(); });
    form.addEventListener("reset", () => setTimeout(filter));
    filter();
    if (found.length) open(found[0]);
  };
  browser();
  draw();
})();
