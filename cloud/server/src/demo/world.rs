//! What the demo's devices see, and what people knew beforehand: sources for devices, the first
//! labelled pictures, and held-out sets, all from one source of frames and never overlapping.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use flywheel_agent::source::{self, FrameBuf, Read, Source};
use flywheel_models::sim;

use crate::api::types::Split;
use crate::picture::Picture;

/// Frames of one encounter in the simulator; one frame of each is enough for a still set.
const SIM_STRIDE: u64 = sim::FRAMES_PER_ENCOUNTER;

/// The world of one demo.
#[derive(Clone, Debug)]
pub struct World {
    /// What `--source` said.
    pub source: String,
    /// URI of each device's source.
    pub devices: Vec<String>,
    /// Classes held rare.
    pub rare: Vec<String>,
    /// The class that appears after the first round.
    pub late: String,
    /// All classes.
    pub classes: Vec<String>,
    /// How far apart two frames of one encounter can be.
    pub track_reach: u64,
    /// Labelled pictures that exist before the first device: where, and how many.
    pub sets: Vec<(Split, String, u64, u64)>,
}

/// What the world is made from.
pub struct Plan<'a> {
    /// `sim:roads`, `idx:DIR` or `dir:DIR`.
    pub source: &'a str,
    /// Classes held rare and their shares; the source's own if empty.
    pub rare: &'a [(String, f64)],
    /// The class that appears late; the source's own if absent.
    pub late: Option<&'a str>,
    /// Seed.
    pub seed: u64,
    /// Number of devices.
    pub devices: u32,
    /// Frames of one device in one round.
    pub frames: u64,
    /// Scale of the still sets: 1 for the real thing, less for a quick look.
    pub scale: f64,
}

impl World {
    /// Lays out a world.
    ///
    /// # Errors
    /// If the source can't be opened, or a class that is named is not in it.
    pub fn new(plan: &Plan<'_>) -> Result<Self> {
        let size = |count: u64| ((count as f64 * plan.scale) as u64).max(60);
        if plan.source.contains('?') {
            bail!(
                "--source {} has parameters of its own; the demo sets them: give the part before the `?`, and --rare, --late and --seed",
                plan.source
            );
        }
        if plan.source == "sim:roads" {
            if !plan.rare.is_empty() || plan.late.is_some() {
                bail!(
                    "--rare and --late go with idx: and dir: sources; sim:roads has rare signs and a late one of its own"
                );
            }
            let class = |at: usize| sim::CLASSES[at].to_owned();
            let seed = plan.seed.wrapping_mul(1000);
            let never = u64::MAX;
            return Ok(Self {
                source: plan.source.to_owned(),
                devices: (1..=u64::from(plan.devices))
                    .map(|device| {
                        format!(
                            "sim:roads?seed={}&late_from={}",
                            seed.wrapping_add(device),
                            plan.frames
                        )
                    })
                    .collect(),
                rare: sim::RARE.into_iter().map(class).collect(),
                late: class(sim::LATE),
                classes: sim::CLASSES.map(str::to_owned).to_vec(),
                track_reach: SIM_STRIDE - 1,
                sets: vec![
                    // The engineer's first drive: a clear day, few of the rare signs.
                    (
                        Split::Train,
                        format!(
                            "sim:roads?seed={}&conditions=clear-day&late_from={never}",
                            seed.wrapping_add(900)
                        ),
                        size(1500),
                        SIM_STRIDE,
                    ),
                    (
                        Split::Calibration,
                        format!(
                            "sim:roads?seed={}&late_from={never}",
                            seed.wrapping_add(901)
                        ),
                        size(500),
                        SIM_STRIDE,
                    ),
                    (
                        Split::Golden,
                        format!("sim:roads?seed={}&mix=balanced", seed.wrapping_add(902)),
                        size(2160),
                        SIM_STRIDE,
                    ),
                ],
            });
        }
        let (scheme, _) = plan.source.split_once(':').unwrap_or_default();
        let base = match scheme {
            "idx" => format!("{}?", plan.source),
            "dir" => format!("{}?stream=1&", plan.source),
            _ => bail!(
                "--source {} is not understood; use sim:roads, idx:DIR or dir:DIR",
                plan.source
            ),
        };
        let open = |query: &str| {
            let uri = format!("{base}{query}");
            source::open(&uri).with_context(|| format!("--source {}", plan.source))
        };
        let classes = open("split=train")?.classes();
        let known = |class: &str| -> Result<()> {
            if classes.iter().any(|known| known == class) {
                Ok(())
            } else {
                bail!(
                    "{} has no class `{class}`; it has {}",
                    plan.source,
                    classes.join(", ")
                )
            }
        };
        // Unless told, the last two classes play the rare and the late one.
        let rare: Vec<(String, f64)> = if plan.rare.is_empty() {
            classes
                .iter()
                .rev()
                .nth(1)
                .map(|class| (class.clone(), 0.01))
                .into_iter()
                .collect()
        } else {
            plan.rare.to_vec()
        };
        let late = match plan.late {
            Some(late) => late.to_owned(),
            None => classes.last().cloned().context("the source has no class")?,
        };
        for (class, _) in &rare {
            known(class)?;
        }
        known(&late)?;
        if rare.iter().any(|(class, _)| *class == late) {
            bail!("class `{late}` can't be both rare and late");
        }
        let shares = rare
            .iter()
            .map(|(class, share)| format!("{class}:{share}"))
            .collect::<Vec<_>>()
            .join(",");
        let never = u64::MAX;
        let seed = plan.seed.wrapping_mul(1000);
        let stream = |pool: &str, late_from: u64, seed: u64| {
            format!("split=train&pool={pool}&rare={shares}&late={late}@{late_from}&seed={seed}")
        };
        // A small folder has no pictures to spare; a large set leaves most to the devices.
        let (first, held) = if scheme == "dir" {
            ("0..0.15", "0.15..0.25")
        } else {
            ("0..0.05", "0.05..0.1")
        };
        let rest = held.split("..").nth(1).unwrap_or("0.25");
        Ok(Self {
            source: plan.source.to_owned(),
            devices: (0..u64::from(plan.devices))
                .map(|device| {
                    format!(
                        "{base}{}&shard={device}/{}",
                        stream(
                            &format!("{rest}..1"),
                            plan.frames,
                            seed.wrapping_add(device)
                        ),
                        plan.devices
                    )
                })
                .collect(),
            sets: vec![
                (
                    Split::Train,
                    format!("{base}{}", stream(first, never, seed.wrapping_add(900))),
                    size(600),
                    1,
                ),
                (
                    Split::Calibration,
                    format!("{base}{}", stream(held, never, seed.wrapping_add(901))),
                    size(400),
                    1,
                ),
                (
                    Split::Golden,
                    format!(
                        "{base}split=test&mix=balanced&seed={}",
                        seed.wrapping_add(902)
                    ),
                    size(1000),
                    1,
                ),
            ],
            rare: rare.into_iter().map(|(class, _)| class).collect(),
            late,
            classes,
            // Draws from a set are independent of each other.
            track_reach: 0,
        })
    }

    /// The sources of the devices by device id, for the truth.
    ///
    /// # Errors
    /// If one can't be opened.
    pub fn truths(&self) -> Result<BTreeMap<String, Box<dyn Source>>> {
        self.devices
            .iter()
            .enumerate()
            .map(|(at, uri)| Ok((device_id(at), source::open(uri)?)))
            .collect()
    }
}

/// Id of a device of the demo.
pub fn device_id(at: usize) -> String {
    format!("cam{}", at + 1)
}

/// Draws the pictures of a still set: `(class, track, picture file)` of each distinct one.
///
/// # Errors
/// If the source fails.
pub fn draw(uri: &str, count: u64, stride: u64) -> Result<Vec<(String, String, Vec<u8>)>> {
    let mut source = source::open(uri)?;
    let mut frame = FrameBuf::new();
    let mut pictures = Vec::new();
    let mut seen = std::collections::BTreeSet::new();
    for at in 0..count {
        let index = at * stride;
        match source.read(index, &mut frame)? {
            Read::End => break,
            Read::Skipped { .. } | Read::NotYet => continue,
            Read::Frame => {}
        }
        let Some(class) = source.truth(index) else {
            continue;
        };
        let file = if frame.encoded.is_empty() {
            Picture {
                width: frame.meta.width,
                height: frame.meta.height,
                channels: frame.meta.channels,
                pixels: frame.pixels.clone(),
            }
            .to_png()?
        } else {
            frame.encoded.clone()
        };
        if seen.insert(flywheel_shared::ids::Digest::of(&file)) {
            pictures.push((class, format!("{uri}#{index}"), file));
        }
    }
    Ok(pictures)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(source: &str) -> Plan<'_> {
        Plan {
            source,
            rare: &[],
            late: None,
            seed: 7,
            devices: 3,
            frames: 100,
            scale: 0.01,
        }
    }

    #[test]
    fn devices_see_different_streams_and_the_late_class_comes_late() {
        let world = World::new(&plan("sim:roads")).unwrap();
        assert_eq!(world.devices.len(), 3);
        let truths = world.truths().unwrap();
        for source in truths.values() {
            assert!((0..100).all(|index| source.truth(index).as_ref() != Some(&world.late)));
        }
        let stream = |device: &str| -> Vec<_> {
            (0..100).map(|index| truths[device].truth(index)).collect()
        };
        assert_ne!(stream("cam1"), stream("cam2"));
    }

    #[test]
    fn still_sets_are_labelled_pictures() {
        let world = World::new(&plan("sim:roads")).unwrap();
        let (split, uri, count, stride) = &world.sets[2];
        assert_eq!(*split, Split::Golden);
        let pictures = draw(uri, *count, *stride).unwrap();
        assert_eq!(pictures.len() as u64, *count);
        assert!(pictures.iter().any(|(class, _, _)| *class == world.late));
        assert!(Picture::decode_file(&pictures[0].2, None).is_ok());
    }

    #[test]
    fn bad_sources_are_named() {
        for (source, wanted) in [
            ("sim:moon", "sim:moon"),
            ("idx:/does/not/exist", "/does/not/exist"),
            ("sim:roads?seed=3", "--seed"),
        ] {
            let error = format!("{:#}", World::new(&plan(source)).unwrap_err());
            assert!(error.contains(wanted), "{error}");
        }
    }
}
