use super::*;
use crate::params::Shape;
use flywheel_shared::spec::{MAX_LEVELS, PriorLevel};
use proptest::prelude::*;
use std::vec;
use std::vec::Vec;

fn detector(head: Head) -> Detector {
    Detector {
        head,
        threshold: 0.6,
        overlap: 0.5,
    }
}

fn corners(candidates: u32) -> Detector {
    detector(Head::Ssd(SsdHead {
        candidates,
        background: true,
        activation: Activation::Done,
        boxes: BoxCode::Corners,
    }))
}

fn input() -> InputSpec {
    InputSpec::new(64, 32, 3)
}

/// Decodes into a list of `room`.
fn boxes(
    detector: &Detector,
    classes: usize,
    heads: &[f32],
    room: usize,
) -> (Vec<Detection>, Found) {
    let mut out = vec![Detection::default(); room];
    let found = decode(detector, &input(), classes, heads, (640, 320), &mut out).unwrap();
    out.truncate(found.candidates);
    (out, found)
}

fn close(found: &Detection, want: [f32; 4]) {
    let has = [found.left, found.top, found.right, found.bottom];
    for (has, want) in has.into_iter().zip(want) {
        assert!((has - want).abs() < 1e-2, "{found:?}");
    }
}

#[test]
fn ssd_corners_are_suppressed_within_a_class_and_scaled_to_the_source() {
    let scores = [
        0.1, 0.7, 0.0, // nothing, class 0, class 1
        0.1, 0.9, 0.0, // the same object, surer
        0.1, 0.0, 0.8, // another class in the same place
        0.9, 0.4, 0.0, // a near miss elsewhere
        0.9, 0.2, 0.0, // not even that
    ];
    let places = [
        0.10, 0.1, 0.30, 0.5, 0.11, 0.1, 0.31, 0.5, 0.10, 0.1, 0.30, 0.5, 0.8, 0.8, 1.2, 1.1, 0.5,
        0.5, 0.6, 0.6,
    ];
    let heads: Vec<f32> = scores.into_iter().chain(places).collect();
    let (list, found) = boxes(&corners(5), 2, &heads, 16);
    assert_eq!(
        found,
        Found {
            detections: 2,
            candidates: 3,
            lost: 0
        }
    );
    let classes: Vec<u16> = list.iter().map(|d| d.class).collect();
    assert_eq!(classes, [0, 1, 0]);
    close(&list[0], [70.4, 32.0, 198.4, 160.0]);
    // Clamped to the frame.
    close(&list[2], [512.0, 256.0, 640.0, 320.0]);
}

#[test]
fn a_full_list_loses_the_least_confident_and_counts_them() {
    let confidences = [0.65, 0.95, 0.7, 0.85, 0.75];
    let mut heads: Vec<f32> = confidences.iter().flat_map(|c| [1.0 - c, *c]).collect();
    for index in 0..5 {
        let left = index as f32 * 0.2;
        heads.extend([left, 0.0, left + 0.1, 1.0]);
    }
    let (list, found) = boxes(&corners(5), 1, &heads, 3);
    assert_eq!((found.detections, found.lost), (3, 2));
    let kept: Vec<f32> = list.iter().map(|d| d.confidence).collect();
    assert_eq!(kept, [0.95, 0.85, 0.75]);
}

/// The priors of UltraFace over a 64 × 32 input.
fn priors() -> Priors {
    let mut levels = [PriorLevel::NONE; MAX_LEVELS];
    for (level, (stride, sizes)) in levels.iter_mut().zip([
        (8, [10, 16, 24, 0]),
        (16, [32, 48, 0, 0]),
        (32, [64, 96, 0, 0]),
    ]) {
        *level = PriorLevel { stride, sizes };
    }
    Priors {
        variance: [0.1, 0.2],
        levels,
    }
}

#[test]
fn priors_lie_row_by_row_and_size_by_size() {
    let (priors, input) = (priors(), input());
    assert_eq!(priors.count(&input), 8 * 4 * 3 + 4 * 2 * 2 + 2 * 2);
    for (index, want) in [
        (0, [4.0, 4.0, 10.0]),
        (2, [4.0, 4.0, 24.0]),
        (3, [12.0, 4.0, 10.0]),
        (24, [4.0, 12.0, 10.0]),
        (96, [8.0, 8.0, 32.0]),
        (112, [16.0, 16.0, 64.0]),
        (115, [48.0, 16.0, 96.0]),
    ] {
        assert_eq!(prior(&priors, &input, index), Some(want), "{index}");
    }
    assert_eq!(prior(&priors, &input, 116), None);
}

proptest! {
    #[test]
    fn offsets_from_priors_give_the_box_that_was_encoded(
        index in 0usize..116, x in 10f32..50.0, y in 8f32..24.0, w in 2f32..16.0, h in 2f32..14.0,
    ) {
        let priors = priors();
        let [px, py, size] = prior(&priors, &input(), index).unwrap();
        let detector = detector(Head::Ssd(SsdHead {
            candidates: 116,
            background: true,
            activation: Activation::Softmax,
            boxes: BoxCode::Offsets(priors),
        }));
        let mut heads = vec![0.0; 116 * 6];
        for row in heads[..232].chunks_exact_mut(2) {
            row[0] = 5.0;
        }
        heads[2 * index + 1] = 9.0;
        let code = [
            (x - px) / size / 0.1,
            (y - py) / size / 0.1,
            libm::logf(w / size) / 0.2,
            libm::logf(h / size) / 0.2,
        ];
        heads[232 + 4 * index..232 + 4 * index + 4].copy_from_slice(&code);
        let (list, found) = boxes(&detector, 1, &heads, 4);
        prop_assert_eq!(found.detections, 1);
        // Ten source pixels an input pixel; the softmax of 9 against 5.
        close(&list[0], [10.0 * (x - w / 2.0), 10.0 * (y - h / 2.0), 10.0 * (x + w / 2.0), 10.0 * (y + h / 2.0)]);
        prop_assert!((list[0].confidence - 0.982_013_8).abs() < 1e-5);
    }

    #[test]
    fn any_values_give_a_sorted_list_inside_the_frame_without_covered_boxes(
        values in prop::collection::vec(prop_oneof![8 => -3f32..3.0, 1 => any::<f32>()], 10 * 7),
        room in 0usize..12,
        form in 0usize..3,
    ) {
        let head = match form {
            0 => Head::Ssd(SsdHead { candidates: 10, background: true, activation: Activation::Sigmoid, boxes: BoxCode::PixelCorners }),
            1 => Head::Yolo { candidates: 10 },
            // 8 + 2 cells of 2 classes, objectness and a box.
            _ => Head::Grid(GridHead { strides: [16, 32, 0, 0, 0], points: 0, activation: Activation::Sigmoid, confidence: Confidence::Product }),
        };
        let detector = detector(head);
        let classes = if form == 1 { 3 } else { 2 };
        let (list, found) = boxes(&detector, classes, &values, room);
        prop_assert!(found.detections <= found.candidates && found.candidates <= room);
        for (index, d) in list.iter().enumerate() {
            prop_assert!(0.0 <= d.left && d.left <= d.right && d.right <= 640.0);
            prop_assert!(0.0 <= d.top && d.top <= d.bottom && d.bottom <= 320.0);
            prop_assert_eq!(index < found.detections, d.confidence >= 0.6);
            for other in &list[..index] {
                prop_assert!(other.confidence >= d.confidence);
                prop_assert!(other.class != d.class || other.overlap(d) <= 0.5);
            }
        }
    }
}

#[test]
fn grid_heads_combine_class_and_objectness_and_give_key_points() {
    let detector = detector(Head::Grid(GridHead {
        strides: [16, 32, 0, 0, 0],
        points: 1,
        activation: Activation::Done,
        confidence: Confidence::GeometricMean,
    }));
    // 4 × 2 cells of stride 16, 2 × 1 of stride 32: class, objectness, box, point of each.
    let mut heads = vec![0.0; 10 * 8];
    for (cell, class, object) in [(5, 0.9, 0.5), (9, 0.81, 1.0)] {
        heads[cell] = class;
        heads[10 + cell] = object;
    }
    heads[20 + 4 * 9..20 + 4 * 9 + 4].copy_from_slice(&[0.5, 0.25, 0.0, libm::logf(0.5)]);
    heads[60 + 2 * 9..60 + 2 * 9 + 2].copy_from_slice(&[0.25, 0.5]);
    let (list, found) = boxes(&detector, 1, &heads, 8);
    assert_eq!(found.detections, 2);
    assert!((list[0].confidence - 0.9).abs() < 1e-6);
    assert!((list[1].confidence - 0.670_820_4).abs() < 1e-6);
    // Cell (1, 0) of stride 32: centre (48, 8), 32 × 16 input pixels.
    close(&list[0], [320.0, 0.0, 640.0, 160.0]);
    assert_eq!(list[0].points[0], [400.0, 160.0]);
    // Cell (1, 1) of stride 16: centre at its corner (16, 16), 16 × 16.
    close(&list[1], [80.0, 80.0, 240.0, 240.0]);
}

#[test]
fn yolo_heads_are_read_down_the_columns() {
    let detector = detector(Head::Yolo { candidates: 2 });
    let heads = [
        32.0, 8.0, // centre x
        16.0, 8.0, // centre y
        16.0, 4.0, // width
        8.0, 4.0, // height
        0.1, 0.7, // class 0
        0.9, 0.0, // class 1
    ];
    let (list, found) = boxes(&detector, 2, &heads, 4);
    assert_eq!(found.detections, 2);
    assert_eq!((list[0].class, list[1].class), (1, 0));
    close(&list[0], [240.0, 120.0, 400.0, 200.0]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut out = [Detection::default(); 2];
    let mut try_it = |detector: &Detector, classes: usize, heads: &[f32]| {
        decode(detector, &input(), classes, heads, (64, 32), &mut out).unwrap_err()
    };
    assert_eq!(
        try_it(&corners(2), 1, &[0.0; 11]),
        DetectError::Length {
            expected: 12,
            found: 11
        }
    );
    assert_eq!(try_it(&corners(2), 0, &[]), DetectError::Classes(0));
    let far = Detector {
        threshold: f32::NAN,
        ..corners(2)
    };
    assert_eq!(try_it(&far, 1, &[0.0; 12]), DetectError::Spec("threshold"));
    let other = detector(Head::Ssd(SsdHead {
        candidates: 5,
        background: true,
        activation: Activation::Done,
        boxes: BoxCode::Offsets(priors()),
    }));
    assert_eq!(
        try_it(&other, 1, &[0.0; 30]),
        DetectError::Priors {
            expected: 5,
            found: 116
        }
    );
}

fn scored(confidences: &[(u16, f32)]) -> Scores {
    let shape = Shape::plain(2, 0, 3);
    let mut values = vec![0.0; shape.values()];
    values[0] = 1.0;
    values[1] = 99.0;
    values[shape.layout().unsure].copy_from_slice(&[-0.5, -0.25, 0.0]);
    values[shape.layout().novel].copy_from_slice(&[-20.0, 0.0, 20.0]);
    let params = Params::checked(shape, &values).unwrap();
    let candidates: Vec<Detection> = confidences
        .iter()
        .map(|(class, confidence)| Detection {
            class: *class,
            confidence: *confidence,
            ..Detection::default()
        })
        .collect();
    score(&candidates, 0.6, &[], &params, &mut [0.0; 2], &mut []).unwrap()
}

#[test]
fn the_least_certain_box_decides_how_unsure_a_frame_is() {
    let empty = scored(&[]);
    assert_eq!((empty.confidence, empty.margin), (1.0, 0.5));
    let sure = scored(&[(1, 0.99), (0, 0.97)]);
    assert_eq!((sure.top1, sure.top2), (1, 0));
    assert_eq!(sure.confidence, 0.99);
    assert_eq!(sure.margin, 0.5);
    let split = scored(&[(1, 0.99), (0, 0.62)]);
    assert!((split.margin - 0.05).abs() < 1e-5);
    let miss = scored(&[(1, 0.57)]);
    assert!((miss.margin - 0.05).abs() < 1e-5);
    assert!((miss.confidence - 0.43).abs() < 1e-6);
    assert!(split.u_unsure > sure.u_unsure && miss.u_unsure > empty.u_unsure);
    assert!(split.entropy > sure.entropy && empty.entropy == 0.0);
    // Sure detections have more energy behind them than an empty frame.
    assert!(sure.energy < empty.energy);
}
