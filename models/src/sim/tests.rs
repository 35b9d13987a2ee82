//! What users of the simulator rely on: reproducible pixels, the stated shares, conditions that
//! show, classes that differ.

use std::collections::BTreeMap;

use super::*;

fn roads(config: RoadsConfig) -> Roads {
    Roads::new(config).expect("a valid configuration")
}

fn draw(roads: &mut Roads, frame: u64) -> Vec<u8> {
    let mut rgb = vec![0; roads.frame_len()];
    roads.render(frame, &mut rgb).expect("the buffer fits");
    rgb
}

/// Share of each key among `n` encounters from `first` on.
fn shares<K: Ord>(
    roads: &Roads,
    first: u64,
    n: u64,
    key: impl Fn(&Scene) -> K,
) -> BTreeMap<K, f64> {
    let mut shares = BTreeMap::new();
    for encounter in first..first + n {
        let scene = roads.scene(encounter * FRAMES_PER_ENCOUNTER);
        *shares.entry(key(&scene)).or_insert(0.0) += 1.0 / n as f64;
    }
    shares
}

fn mean(rgb: &[u8]) -> f64 {
    rgb.iter().map(|&b| f64::from(b)).sum::<f64>() / rgb.len() as f64
}

fn contrast(rgb: &[u8]) -> f64 {
    let mean = mean(rgb);
    (rgb.iter()
        .map(|&b| (f64::from(b) - mean).powi(2))
        .sum::<f64>()
        / rgb.len() as f64)
        .sqrt()
}

/// Mean of a measure over the last frames of up to 60 encounters with these conditions.
fn measured(lighting: Lighting, weather: Weather, measure: fn(&[u8]) -> f64) -> f64 {
    let mut roads = roads(RoadsConfig {
        mix: Mix::Balanced,
        ..RoadsConfig::default()
    });
    let frames: Vec<u64> = (0..2_000)
        .map(|encounter| encounter * FRAMES_PER_ENCOUNTER + 4)
        .filter(|&frame| {
            let scene = roads.scene(frame);
            scene.lighting == lighting && scene.weather == weather
        })
        .take(60)
        .collect();
    assert!(frames.len() > 20, "{lighting:?} {weather:?} hardly occurs");
    frames
        .iter()
        .map(|&frame| measure(&draw(&mut roads, frame)))
        .sum::<f64>()
        / frames.len() as f64
}

#[test]
fn pixels_follow_from_seed_and_frame_alone() {
    let config = RoadsConfig {
        late_from: 40,
        ..RoadsConfig::default()
    };
    let (mut forward, mut scattered) = (roads(config.clone()), roads(config.clone()));
    let in_order: Vec<Vec<u8>> = (0..60).map(|frame| draw(&mut forward, frame)).collect();
    for k in 0..60 {
        let frame = k * 37 % 60;
        assert_eq!(
            draw(&mut scattered, frame),
            in_order[frame as usize],
            "frame {frame}"
        );
    }
    let mut other = roads(RoadsConfig {
        seed: config.seed + 1,
        ..config
    });
    let same = (0..60)
        .filter(|&frame| draw(&mut other, frame) == in_order[frame as usize])
        .count();
    assert_eq!(same, 0);
}

#[test]
fn an_encounter_shows_one_sign_under_one_sky() {
    let mut roads = roads(RoadsConfig::default());
    for encounter in 0..40 {
        let frames = encounter * FRAMES_PER_ENCOUNTER..(encounter + 1) * FRAMES_PER_ENCOUNTER;
        let scenes: Vec<Scene> = frames.clone().map(|frame| roads.scene(frame)).collect();
        let first = scenes[0];
        assert!(scenes.iter().all(|s| {
            (s.encounter, s.class, s.lighting, s.weather)
                == (encounter, first.class, first.lighting, first.weather)
        }));
        let pixels: Vec<Vec<u8>> = frames.map(|frame| draw(&mut roads, frame)).collect();
        assert!(
            pixels.windows(2).all(|pair| pair[0] != pair[1]),
            "frames repeat"
        );
    }
}

#[test]
fn a_stream_holds_the_stated_shares() {
    let late_encounter = 20_000;
    let roads = roads(RoadsConfig {
        late_from: late_encounter * FRAMES_PER_ENCOUNTER,
        ..RoadsConfig::default()
    });
    let before = shares(&roads, 0, late_encounter, |s| s.class);
    let after = shares(&roads, late_encounter, 20_000, |s| s.class);
    assert!(!before.contains_key(&LATE));
    assert!(
        (after[&LATE] - 0.015).abs() < 0.003,
        "late {}",
        after[&LATE]
    );
    for class in RARE {
        for shares in [&before, &after] {
            assert!(
                (shares[&class] - 0.008).abs() < 0.0025,
                "{} {}",
                CLASSES[class],
                shares[&class]
            );
        }
    }
    for class in 0..COMMON {
        assert!(
            (before[&class] - 0.976 / COMMON as f64).abs() < 0.008,
            "{}",
            CLASSES[class]
        );
    }
    let light = shares(&roads, 0, 20_000, |s| s.lighting);
    let air = shares(&roads, 0, 20_000, |s| s.weather);
    for (share, stated) in [
        (light[&Lighting::Day], 0.55),
        (light[&Lighting::Dusk], 0.15),
        (light[&Lighting::Night], 0.30),
        (air[&Weather::Clear], 0.55),
        (air[&Weather::Rain], 0.15),
        (air[&Weather::Fog], 0.20),
        (air[&Weather::Snow], 0.10),
    ] {
        assert!((share - stated).abs() < 0.015, "{share} for {stated}");
    }
}

#[test]
fn the_late_class_never_comes_before_its_frame() {
    // Inside an encounter: the encounter that holds frame 52 began before it and stays without.
    let roads = roads(RoadsConfig {
        late_share: 0.97,
        rare_share: 0.0,
        late_from: 52,
        ..RoadsConfig::default()
    });
    assert!((0..55).all(|frame| roads.scene(frame).class != LATE));
    assert!((55..200).any(|frame| roads.scene(frame).class == LATE));
}

#[test]
fn a_balanced_stream_deals_every_class_once_a_round() {
    let roads = roads(RoadsConfig {
        mix: Mix::Balanced,
        ..RoadsConfig::default()
    });
    let n = CLASSES.len() as u64;
    let mut orders = std::collections::BTreeSet::new();
    for round in 0..50 {
        let order: Vec<usize> = (round * n..(round + 1) * n)
            .map(|encounter| roads.scene(encounter * FRAMES_PER_ENCOUNTER).class)
            .collect();
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..CLASSES.len()).collect::<Vec<_>>());
        orders.insert(order);
    }
    assert_eq!(orders.len(), 50, "rounds repeat");
}

#[test]
fn clear_day_is_only_that_and_moves_no_class() {
    let all = roads(RoadsConfig::default());
    let clear = roads(RoadsConfig {
        conditions: Conditions::ClearDay,
        ..RoadsConfig::default()
    });
    for frame in 0..2_000 {
        let (a, c) = (all.scene(frame), clear.scene(frame));
        assert_eq!((c.lighting, c.weather), (Lighting::Day, Weather::Clear));
        assert_eq!(a.class, c.class);
    }
}

#[test]
fn night_is_dark_and_fog_swallows_contrast() {
    let day = measured(Lighting::Day, Weather::Clear, mean);
    let dusk = measured(Lighting::Dusk, Weather::Clear, mean);
    let night = measured(Lighting::Night, Weather::Clear, mean);
    assert!(
        night < 0.6 * day && night < dusk && dusk < 0.75 * day,
        "day {day}, dusk {dusk}, night {night}"
    );
    for lighting in [Lighting::Day, Lighting::Night] {
        let clear = measured(lighting, Weather::Clear, contrast);
        let fog = measured(lighting, Weather::Fog, contrast);
        assert!(fog < 0.75 * clear, "{lighting:?}: clear {clear}, fog {fog}");
    }
}

#[test]
fn every_class_is_drawn_and_none_looks_like_another() {
    let side = 48;
    let atlas = Atlas::draw(side);
    for style in 0..STYLES {
        for (a, name) in CLASSES.iter().enumerate() {
            let texture = atlas.texture(a, style);
            let opaque = texture.texels.iter().filter(|t| t[3] > 0.99).count();
            assert!(opaque * 3 > side * side, "{name} is hardly there");
            for (b, other_name) in CLASSES.iter().enumerate().take(a) {
                let other = atlas.texture(b, style);
                let differ = texture
                    .texels
                    .iter()
                    .zip(&other.texels)
                    .filter(|(x, y)| x.iter().zip(*y).any(|(p, q)| (p - q).abs() > 0.2))
                    .count();
                assert!(differ * 50 > side * side, "{name} looks like {other_name}");
            }
        }
    }
}

#[test]
fn other_sizes_show_the_same_scene() {
    let config = |size| RoadsConfig {
        size,
        conditions: Conditions::ClearDay,
        ..RoadsConfig::default()
    };
    let (mut small, mut large) = (roads(config(32)), roads(config(64)));
    for encounter in 0..10 {
        let frame = encounter * FRAMES_PER_ENCOUNTER + 4;
        assert_eq!(small.scene(frame), large.scene(frame));
        let (a, b) = (
            mean(&draw(&mut small, frame)),
            mean(&draw(&mut large, frame)),
        );
        assert!(
            (a - b).abs() < 6.0,
            "frame {frame}: mean {a} at 32, {b} at 64"
        );
    }
}

#[test]
fn bad_configurations_are_named() {
    let check = |config: RoadsConfig, expected: RoadsError| {
        assert_eq!(Roads::new(config).err(), Some(expected));
    };
    let base = RoadsConfig::default;
    check(RoadsConfig { size: 8, ..base() }, RoadsError::Size(8));
    check(
        RoadsConfig {
            late_share: -0.1,
            ..base()
        },
        RoadsError::Share {
            name: "late",
            value: -0.1,
        },
    );
    check(
        RoadsConfig {
            rare_share: 0.3,
            late_share: 0.1,
            ..base()
        },
        RoadsError::Crowded {
            rare: 0.3,
            late: 0.1,
        },
    );
    assert!(
        Roads::new(RoadsConfig {
            rare_share: f32::NAN,
            ..base()
        })
        .is_err()
    );
    let mut roads = roads(base());
    assert_eq!(
        roads.render(0, &mut [0; 7]),
        Err(RoadsError::Buffer {
            needed: 3072,
            got: 7
        })
    );
}
