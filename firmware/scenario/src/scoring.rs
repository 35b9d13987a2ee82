//! Score parameters are read, and answers of known kinds are scored.

use core::fmt::Write;

use device_core::params::Params;
use device_core::score::{ScoreError, score};
use flywheel_shared::message::Scores;

use crate::Failure::{self, Broken};
use crate::report::Fixed;
use crate::stream::{CLASSES, DIM, LATE, Scene, Stream, World};
use crate::vectors::SCORES;

/// Values of the score parameters of this scenario; see `device_core::params::Layout`.
pub(crate) const VALUES: usize = (SCORES.len() - device_core::params::HEADER) / 4;
/// Values that scoring needs beside.
pub(crate) const SCRATCH: usize = 2 * DIM;

/// Prints what the answers score, and that damage is noticed; returns the parameters.
#[inline(never)] // See `crate::run`.
pub(crate) fn run<'a>(
    out: &mut impl Write,
    values: &'a mut [f32; VALUES],
) -> Result<Params<'a>, Failure> {
    if Params::shape_of(&SCORES[..SCORES.len() - 1]).is_ok() {
        return Err(Broken("score parameters are read though a byte is missing"));
    }
    let params =
        Params::parse(SCORES, values).map_err(|_| Broken("the score parameters do not parse"))?;
    let shape = params.shape();
    writeln!(
        out,
        "score: {} classes, {} embedding values, {} knots, T {}",
        shape.classes,
        shape.dim,
        shape.table,
        Fixed(params.temperature())
    )?;

    let world = World::new();
    let mut stream = Stream::new(21);
    let between = |a: &[f32; DIM], b: &[f32; DIM], part: f32| -> [f32; DIM] {
        core::array::from_fn(|i| a[i] + part * (b[i] - a[i]))
    };
    let (first, second) = (world.mean(0), world.mean(1));
    let cases = [
        ("typical", *first),
        ("half way", between(first, second, 0.5)),
        ("nearer", between(first, second, 0.4)),
        ("by day", stream.fresh(Scene::DAY).embedding),
        ("at night", stream.fresh(Scene::NIGHT).embedding),
        ("unknown", *world.mean(LATE)),
        ("brighter", first.map(|x| 40.0 * x)),
        ("opposite", first.map(|x| -x)),
        ("all zero", [0.0; DIM]),
    ];
    for (name, embedding) in cases {
        let scores = of(&world.logits(&embedding), &embedding, &params)?;
        writeln!(
            out,
            "score: {name}: class {} then {}, margin {}, novelty {}, u unsure {}, u novel {}",
            scores.top1,
            scores.top2,
            Fixed(scores.margin),
            Fixed(scores.novelty),
            Fixed(scores.u_unsure),
            Fixed(scores.u_novel)
        )?;
    }

    let mut broken = [0.0; CLASSES];
    broken[3] = f32::NAN;
    let mut scratch = [0.0; SCRATCH];
    match score(&broken, first, &params, &mut scratch) {
        Err(error @ ScoreError::NotFinite) => writeln!(out, "score: a NaN: refused, {error}")?,
        _ => return Err(Broken("a NaN is scored")),
    }
    Ok(params)
}

/// Scores an answer of the scenario's own model.
pub(crate) fn of(
    logits: &[f32; CLASSES],
    embedding: &[f32; DIM],
    params: &Params<'_>,
) -> Result<Scores, Failure> {
    let mut scratch = [0.0; SCRATCH];
    score(logits, embedding, params, &mut scratch).map_err(|_| Broken("an answer is not scored"))
}
