"""The page of a forced-choice study: pairs of pictures, of which a person says which is real.

It is one HTML file that sends nothing anywhere: answers are kept in the browser's storage, where
there is one, and downloaded at the end as the JSON that metrics.forced_choice reads. Which pictures
are real is not in it, but for those of practice.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion.plotting.html_page import html_page, png_uri
from diffusion.plotting.image_grid import as_rgb, enlarge

MIN_PICTURE_SIDE = 128  # pixels: smaller images are enlarged until their shorter side has these

Pair = tuple[str, str]  # data URIs


class StudyPairs(NamedTuple):
    """What a page shows.

    Attributes:
      pairs: of pictures, in any order; the page shows them to each person in another one.
      practice: pairs that come first, with the answer.
      practice_real: 0 or 1, the real picture of each of them.
      seconds: that a pair is shown; 0: until it is answered.
    """

    pairs: Sequence[Pair]
    practice: Sequence[Pair]
    practice_real: Sequence[int]
    seconds: float


def picture_uri(image: np.ndarray) -> str:
    """Returns the data URI of an image uint8[h, w, 1 or 3], enlarged until a person can see it."""
    channels = image.shape[-1]
    scale = -(-MIN_PICTURE_SIDE // min(image.shape[:2]))
    return png_uri(enlarge(as_rgb("picture_uri", image, "h, w"), scale)[..., :channels])


def study_id(shown: StudyPairs) -> str:
    """Returns 16 hexadecimal digits that stand for all that a page shows."""
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def study_page(shown: StudyPairs) -> str:
    """Returns the HTML document of a study."""
    key = base64.b64encode(json.dumps([*shown.practice_real]).encode()).decode()
    content = shown._asdict() | {"practice_real": key, "id": study_id(shown)}
    script = f"const STUDY = {json.dumps(content)};\n{SCRIPT}"
    time = f"Each pair is shown for {shown.seconds:g} seconds. " if shown.seconds else ""
    first = ""
    if n := len(shown.practice):
        first = f"It begins with {n} pair{'s' * (n > 1)} for practice, with the answer. "
    body = BODY.format(n=len(shown.pairs), time=time, practice=first)
    return html_page("Which picture is real?", body, PAGE_STYLE, script)


BODY = """<main>
<noscript><p>This page needs JavaScript.</p></noscript>
<section id="intro" hidden>
<h1>Which picture is real?</h1>
<p>You will see {n} pairs of pictures. In each pair one picture is real, and a computer has made the
other one. Choose the one that you take for real; if you do not know, guess.</p>
<p>Click or touch a picture, or press <kbd>&larr;</kbd> or <kbd>&rarr;</kbd>, or <kbd>1</kbd> or
<kbd>2</kbd>. {time}{practice}A few pairs may be easy: they show
whether you are still looking.</p>
<form id="start">
<p><label for="person">A name for your answers</label><br>
<input id="person" required maxlength="32" pattern="[A-Za-z0-9_\\-]+" autocomplete="off"
 spellcheck="false" aria-describedby="about"></p>
<p id="about" class="faint">Letters, digits, - and _. Your answers, and how long each took, stay in
this browser until you download them; nothing is sent.</p>
<button id="begin">Begin</button> <button id="anew" type="button" hidden>Start anew</button>
</form>
</section>
<section id="trial" hidden>
<p id="count" role="status"></p>
<progress id="progress" aria-label="progress"></progress>
<h1 id="question">Which one is real?</h1>
<div id="pair" aria-busy="true" class="covered">
<button id="left"><img alt="picture on the left"><span>&larr; left</span></button>
<button id="right"><img alt="picture on the right"><span>right &rarr;</span></button>
</div>
<p id="feedback" role="status"></p>
<button id="next" hidden>Next</button>
</section>
<section id="done" hidden>
<h1 tabindex="-1" id="thanks">Thank you</h1>
<p id="summary"></p>
<p><a id="download" class="button">Download your answers</a></p>
<p><label for="text">Where downloads are blocked, copy this text instead:</label></p>
<textarea id="text" readonly rows="6"></textarea>
<p><button id="another">Another person</button></p>
</section>
</main>"""

PAGE_STYLE = """
main { max-width: 44rem; margin: auto; }
h1 { font-size: 1.4rem; }
button, .button { font: inherit; color: var(--ink); background: transparent; cursor: pointer;
  border: 2px solid var(--line); border-radius: .5rem; padding: .5rem 1rem; }
#begin, #next, .button { border-color: var(--mark); text-decoration: none; }
.button { display: inline-block; }
:focus-visible { outline: 3px solid var(--mark); outline-offset: 2px; }
input, textarea { font: inherit; color: inherit; background: transparent; padding: .4rem;
  border: 1px solid var(--faint); border-radius: .3rem; max-width: 100%; }
textarea { width: 100%; font: .8rem/1.3 monospace; }
kbd { border: 1px solid var(--line); border-radius: .2rem; padding: 0 .3rem; }
progress { width: 100%; accent-color: var(--mark); }
#pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
#pair button { padding: .5rem; touch-action: manipulation; user-select: none; }
#pair img { display: block; width: 100%; margin-bottom: .3rem; }
#pair.covered img { visibility: hidden; }
#pair button.real { border-color: var(--mark); outline: 3px solid var(--mark); }
#feedback { min-height: 1.5em; }
[hidden] { display: none; }
"""

SCRIPT = r"""'use strict';
const KEY = 'study-' + STUDY.id, PERSON = /^[A-Za-z0-9_-]{1,32}$/;
const GUARD_MS = 200;  // nobody judges a pair in less: the second click of a double click
const BLANK_MS = 500;  // before a pair that is shown for a short time
const $ = id => document.getElementById(id);
const SIDES = ['left', 'right'];
const practiceReal = JSON.parse(atob(STUDY.practice_real));
let state = load(), queue = [], trial = null, shownAt = 0, timer = 0;

// Storage is missing in private windows of some browsers: the page then works without it.
function load() {
  try {
    const old = JSON.parse(localStorage.getItem(KEY));
    if (PERSON.test(old.person) && Array.isArray(old.answers)) return old;
  } catch { /* nothing there, or nothing of ours */ }
  return {person: '', answers: []};
}
function save() {
  try { localStorage.setItem(KEY, JSON.stringify(state)); } catch { /* see load */ }
}
function forget() {
  try { localStorage.removeItem(KEY); } catch { /* see load */ }
  state = {person: '', answers: []};
  intro();
}

// Marsaglia's xorshift of 32 bits: the same name has the same order after a reload.
function generator(text) {
  let x = 1;
  for (const c of text) x = (Math.imul(x, 31) + c.charCodeAt(0)) | 0;
  const step = () => {
    x = x || 1;
    x ^= x << 13; x ^= x >>> 17; x ^= x << 5;
    return (x >>> 0) / 2 ** 32;
  };
  for (let i = 0; i < 32; i++) step();
  return step;
}
function shuffled(n, random) {
  const order = [...Array(n).keys()];
  for (let i = n - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

function show(section) {
  for (const id of ['intro', 'trial', 'done']) $(id).hidden = id !== section;
}
function intro() {
  if (state.answers.length === STUDY.pairs.length) return finish();
  const begun = state.answers.length > 0;
  const bytes = [...crypto.getRandomValues(new Uint8Array(5))];
  $('person').value = state.person || bytes.map(b => b.toString(16).padStart(2, '0')).join('');
  $('person').readOnly = begun;
  $('begin').textContent = begun ? 'Continue' : 'Begin';
  $('anew').hidden = !begun;
  show('intro');
}
function begin() {
  state.person = $('person').value;
  save();
  const random = generator(STUDY.id + state.person), side = () => random() < 0.5 ? 0 : 1;
  const order = shuffled(STUDY.pairs.length, random).map(pair => ({pair, left: side()}));
  const practice = STUDY.practice.map((_, i) => ({practice: i, left: side()}));
  queue = order.slice(state.answers.length);
  if (!state.answers.length) queue = [...practice, ...queue];
  show('trial');
  next();
}

const wait = ms => new Promise(resolve => setTimeout(resolve, ms));
const frame = () => new Promise(requestAnimationFrame);
const cover = covered => $('pair').classList.toggle('covered', covered);
const busy = is => $('pair').setAttribute('aria-busy', is);
async function next() {
  trial = queue.shift();
  if (!trial) return finish();
  busy(true);
  cover(true);
  $('next').hidden = true;
  $('feedback').textContent = '';
  const done = state.answers.length, all = STUDY.pairs.length, first = 'practice' in trial;
  $('count').textContent = first ? `Practice ${trial.practice + 1} of ${STUDY.practice.length}`
    : `Pair ${done + 1} of ${all}`;
  $('progress').max = all;
  $('progress').value = done;
  const pictures = first ? STUDY.practice[trial.practice] : STUDY.pairs[trial.pair];
  const images = SIDES.map((side, i) => {
    $(side).classList.remove('real');
    const image = $(side).querySelector('img');
    image.src = pictures[i ^ trial.left];
    return image;
  });
  await Promise.all(images.map(image => image.decode().catch(() => {})));
  if (STUDY.seconds) await wait(BLANK_MS);
  await frame();
  cover(false);
  shownAt = performance.now();
  if (STUDY.seconds) timer = setTimeout(cover, 1000 * STUDY.seconds, true);
  await wait(GUARD_MS);
  busy(false);
}
function answer(side) {
  if ($('trial').hidden || $('pair').getAttribute('aria-busy') === 'true') return;
  const seconds = Math.round(performance.now() - shownAt) / 1000, choice = side ^ trial.left;
  busy(true);
  clearTimeout(timer);
  if ('practice' in trial) return explain(choice);
  state.answers.push({pair: trial.pair, left: trial.left, choice, seconds});
  save();
  next();
}
function explain(choice) {
  const real = practiceReal[trial.practice], side = SIDES[real ^ trial.left];
  cover(false);
  $(side).classList.add('real');
  $('feedback').textContent = (choice === real ? 'Yes' : 'No') + `: the ${side} one is real.`;
  const last = trial.practice === STUDY.practice.length - 1;
  $('next').textContent = last ? `Begin the ${STUDY.pairs.length} pairs` : 'Next';
  $('next').hidden = false;
  $('next').focus();
}
function finish() {
  const {person, answers} = state, text = JSON.stringify({study: STUDY.id, person, answers});
  $('summary').textContent = `You have answered all ${answers.length} pairs. `
    + 'Please send the file of your answers to whoever gave you this page.';
  $('text').value = text;
  URL.revokeObjectURL($('download').href);
  $('download').href = URL.createObjectURL(new Blob([text], {type: 'application/json'}));
  $('download').download = `answers-${person}.json`;
  show('done');
  $('thanks').focus();
}

$('start').addEventListener('submit', event => { event.preventDefault(); begin(); });
SIDES.forEach((id, side) => $(id).addEventListener('click', () => answer(side)));
$('next').addEventListener('click', next);
$('anew').addEventListener('click', () => confirm('Delete the answers so far?') && forget());
$('another').addEventListener('click',
  () => confirm('Delete these answers from the browser? Download them first.') && forget());
$('text').addEventListener('focus', () => $('text').select());
document.addEventListener('keydown', event => {
  const side = {ArrowLeft: 0, 1: 0, ArrowRight: 1, 2: 1}[event.key];
  if (side === undefined || $('trial').hidden || event.repeat) return;
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  answer(side);
});
intro();
"""
