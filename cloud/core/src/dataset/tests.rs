//! Versions are canonical, their splits don't leak, and their texts survive a round trip.

use super::*;
use proptest::prelude::*;

fn sample(n: u32) -> Digest {
    Digest::of(&n.to_le_bytes())
}

fn label<'a>(n: u32, class: &'a str, track: &'a str, at_ms: u64) -> Label<'a> {
    Label {
        digest: sample(n),
        class,
        track,
        at_ms,
    }
}

fn from<'a>(labels: &'a [Label<'a>], classes: &'a [String]) -> Freeze<'a> {
    Freeze {
        labels,
        pseudo: &[],
        classes,
        parent: None,
        source: "queue",
        seed: 7,
    }
}

#[test]
fn known_classes_come_first_and_new_ones_by_first_label() {
    let labels = [
        label(1, "zebra", "", 5),
        label(2, "yield", "", 9),
        label(3, "deer", "", 5),
        label(4, "ant", "", 8),
    ];
    let known = ["stop".to_owned(), "yield".to_owned()];
    let manifest = freeze(&from(&labels, &known)).unwrap().manifest;
    assert_eq!(manifest.classes, ["stop", "yield", "deer", "zebra", "ant"]);
    assert_eq!(manifest.items.len(), 4);
    assert!(manifest.items.is_sorted_by(|a, b| a.digest < b.digest));
}

#[test]
fn the_latest_of_contradicting_labels_counts_and_is_reported() {
    let labels = [
        label(1, "stop", "", 5),
        label(1, "yield", "", 9),
        label(1, "stop", "", 7),
        label(2, "stop", "", 1),
        label(2, "stop", "", 2),
    ];
    let frozen = freeze(&from(&labels, &[])).unwrap();
    let one = frozen.manifest.items.iter().find(|x| x.digest == sample(1));
    assert_eq!(frozen.manifest.class_of(one.unwrap()), "yield");
    assert_eq!(
        frozen.conflicts,
        [Conflict {
            digest: sample(1),
            classes: vec!["stop".into(), "yield".into()]
        }]
    );
}

#[test]
fn about_a_tenth_of_the_tracks_validates_and_every_class_can_train() {
    let tracks: Vec<String> = (0..1000).map(|i| format!("cam1/{i}")).collect();
    let mut labels: Vec<Label<'_>> = (0..3000_u32)
        .map(|n| label(n, "stop", &tracks[n as usize % 1000], 0))
        .collect();
    let names: Vec<String> = (0..40).map(|i| format!("rare {i}")).collect();
    labels.extend((3000..3040_u32).map(|n| label(n, &names[n as usize - 3000], "", 0)));
    let manifest = freeze(&from(&labels, &[])).unwrap().manifest;
    let validation = manifest
        .items
        .iter()
        .filter(|x| x.split == Split::Validation)
        .count();
    assert!((210..=390).contains(&validation), "{validation} of 3040");
    for (class, (train, _)) in manifest.classes.iter().zip(manifest.counts()) {
        assert!(train > 0, "{class} has nothing to train on");
    }
}

#[test]
fn bad_labels_name_what_is_wrong() {
    assert_eq!(freeze(&from(&[], &[])), Err(FreezeError::Empty));
    let labels = [label(1, "a\tb", "", 0)];
    assert!(matches!(
        freeze(&from(&labels, &[])),
        Err(FreezeError::Class { digest, .. }) if digest == sample(1)
    ));
    let labels = [label(1, "a", "", 0)];
    let two_lines = Freeze {
        source: "x\nitem",
        ..from(&labels, &[])
    };
    assert!(matches!(freeze(&two_lines), Err(FreezeError::Source(_))));
}

#[test]
fn a_diff_names_every_kind_of_change() {
    let old = [
        label(1, "stop", "", 0),
        label(2, "stop", "", 0),
        label(3, "yield", "", 0),
    ];
    let new = [
        label(1, "stop", "", 0),
        label(2, "deer", "", 1),
        label(4, "yield", "", 0),
    ];
    let old = freeze(&from(&old, &[])).unwrap().manifest;
    let new = freeze(&from(&new, &old.classes)).unwrap().manifest;
    let change = diff(&old, &new);
    assert_eq!(change.added, [(sample(4), "yield".to_owned())]);
    assert_eq!(change.removed, [(sample(3), "yield".to_owned())]);
    assert_eq!(
        change.relabelled,
        [(sample(2), "stop".to_owned(), "deer".to_owned())]
    );
    assert_eq!(change.new_classes, ["deer"]);
    assert_eq!(diff(&old, &old), Diff::default());
}

#[test]
fn damaged_texts_are_refused_by_line() {
    let labels = [label(1, "stop", "", 0), label(2, "yield", "", 0)];
    let text = freeze(&from(&labels, &[])).unwrap().manifest.to_text();
    assert!(Manifest::parse(&text).is_ok());
    for (bad, line) in [
        (text.replace("dataset 1", "dataset 2"), 1),
        (text.replace("parent -", "parent 12"), 2),
        (text.replace("seed 7", "seed x"), 4),
        (text.replace("class yield", "class "), 6),
        (text.replace(" 1 train", " 9 train"), 0),
        (text.replace("class yield", "class stop"), 0),
        (text.replace("seed 7", "seed 07"), 0),
        (text.trim_end().to_owned(), 0),
        (String::new(), 0),
    ] {
        let error = Manifest::parse(&bad).expect_err(&bad);
        assert!(line == 0 || error.line == line, "{error}");
    }
}

proptest! {
    #[test]
    fn versions_are_canonical_and_tracks_never_straddle(
        labels in prop::collection::vec((0_u32..60, 0_usize..4, 0_usize..12, 0_u64..5), 1..120),
        seed in any::<u64>(),
    ) {
        let classes = ["stop", "yield", "deer", "speed 30"];
        let tracks: Vec<String> = (0..12).map(|t| if t == 0 { String::new() } else { format!("t{t}") }).collect();
        // A sample is seen on one track only.
        let mut labels: Vec<Label<'_>> = labels
            .iter()
            .map(|&(n, c, _, at)| label(n, classes[c], &tracks[n as usize % 12], at))
            .collect();
        let freeze_all = |labels: &[Label<'_>]| {
            freeze(&Freeze { seed, ..from(labels, &[]) }).unwrap().manifest
        };
        let manifest = freeze_all(&labels);
        prop_assert_eq!(&Manifest::parse(&manifest.to_text()).unwrap(), &manifest);
        labels.reverse();
        prop_assert_eq!(freeze_all(&labels).id(), manifest.id());

        let splits: BTreeMap<Digest, Split> =
            manifest.items.iter().map(|x| (x.digest, x.split)).collect();
        let mut by_track: BTreeMap<&str, Split> = BTreeMap::new();
        for label in labels.iter().filter(|l| !l.track.is_empty()) {
            let split = splits[&label.digest];
            prop_assert_eq!(*by_track.entry(label.track).or_insert(split), split);
        }
    }
}

#[test]
fn pseudo_labels_stand_only_where_people_said_nothing() {
    let labels = [label(1, "stop", "", 5), label(2, "yield", "", 5)];
    let pseudo = [
        label(1, "yield", "", 0),
        label(3, "stop", "", 0),
        label(4, "unheard-of", "", 0),
    ];
    let frozen = freeze(&Freeze {
        pseudo: &pseudo,
        ..from(&labels, &[])
    });
    let manifest = frozen.unwrap().manifest;
    assert_eq!(manifest.classes, ["stop", "yield"]);
    let of = |n| manifest.items.iter().find(|x| x.digest == sample(n));
    assert_eq!(of(1).map(|x| (x.class, x.split)), Some((0, Split::Train)));
    assert_eq!(of(3).map(|x| (x.class, x.split)), Some((0, Split::Pseudo)));
    assert_eq!(of(4), None);
    assert_eq!(manifest.pseudo(), 1);
    assert_eq!(manifest.counts(), [(1, 0), (1, 0)]);
    assert_eq!(Manifest::parse(&manifest.to_text()), Ok(manifest));
}
