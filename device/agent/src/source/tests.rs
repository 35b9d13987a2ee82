//! The sources through the one door that users have, [`open`]; real data sets where they are there.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;

use super::*;

fn refused(uri: &str, expected: &[&str]) {
    let said = match open(uri) {
        Ok(_) => panic!("{uri} was opened"),
        Err(error) => error.to_string(),
    };
    for part in expected {
        assert!(said.contains(part), "{uri}: {said:?} doesn't say {part:?}");
    }
}

fn frame(source: &mut dyn Source, index: u64) -> FrameBuf {
    let mut buffer = FrameBuf::new();
    assert_eq!(
        source.read(index, &mut buffer).expect("readable"),
        Read::Frame
    );
    buffer
}

/// Share of each class in the frames of a range.
fn shares(source: &dyn Source, frames: std::ops::Range<u64>) -> BTreeMap<String, f64> {
    let n = (frames.end - frames.start) as f64;
    let mut shares = BTreeMap::new();
    for index in frames {
        *shares
            .entry(source.truth(index).expect("truth"))
            .or_insert(0.0) += 1.0 / n;
    }
    shares
}

/// Writes an idx set of `n` pictures, 4 × 3, label = number % 10: six pixels of 20 × label, six of
/// the picture's number.
fn write_idx(folder: &Path, prefix: &str, n: u8, gzip: bool) {
    let mut images = vec![0, 0, 8, 3, 0, 0, 0, n, 0, 0, 0, 3, 0, 0, 0, 4];
    let mut labels = vec![0, 0, 8, 1, 0, 0, 0, n];
    for i in 0..n {
        let label = i % 10;
        labels.push(label);
        images.extend([20 * label; 6]);
        images.extend([i; 6]);
    }
    for (name, bytes) in [("images-idx3", images), ("labels-idx1", labels)] {
        if gzip {
            let file =
                fs::File::create(folder.join(format!("{prefix}-{name}-ubyte.gz"))).expect("create");
            let mut encoder = GzEncoder::new(file, Compression::fast());
            encoder.write_all(&bytes).expect("write");
            encoder.finish().expect("finish");
        } else {
            fs::write(folder.join(format!("{prefix}-{name}-ubyte")), bytes).expect("write");
        }
    }
}

fn write_picture(path: &Path, seed: u8) {
    fs::create_dir_all(path.parent().expect("parent")).expect("folder");
    let picture = image::RgbImage::from_fn(8, 6, |x, y| {
        image::Rgb([seed, (x * 9) as u8, (y * 9) as u8])
    });
    picture.save(path).expect("save");
}

#[test]
fn bad_uris_are_named() {
    refused(
        "rtsp:camera",
        &["rtsp", "sim:roads", "idx:DIR", "dir:PATH", "v4l2:"],
    );
    #[cfg(not(feature = "v4l2"))]
    refused("v4l2:/dev/video0", &["v4l2", "--features v4l2"]);
    #[cfg(feature = "v4l2")]
    refused("v4l2:/dev/no-such-camera", &["/dev/no-such-camera"]);
    refused("dir:.?watch=2", &["watch=2", "0 or 1"]);
    refused(
        "dir:.?watch=1&stream=1",
        &["stream", "poll_ms", "deadline_ms"],
    );
    refused("sim:rails", &["sim:rails", "sim:roads"]);
    refused("idx:", &["not one of"]);
    refused(
        "sim:roads?sed=7",
        &["\"sed\"", "seed", "late_from", "conditions"],
    );
    refused("sim:roads?seed=x", &["seed=x", "whole number"]);
    refused("sim:roads?seed", &["seed", "name=value"]);
    refused("sim:roads?seed=1&seed=2", &["only once"]);
    refused("sim:roads?size=4", &["size=4", "16"]);
    refused("sim:roads?rare=0.4", &["rare=0.4", "common"]);
    refused("sim:roads?rare=NaN", &["rare=NaN", "share"]);
    refused(
        "sim:roads?conditions=hail",
        &["conditions=hail", "all or clear-day"],
    );
    refused(
        "idx:nowhere-at-all",
        &["nowhere-at-all", "train-images-idx3-ubyte.gz"],
    );
    refused("dir:nowhere-at-all", &["nowhere-at-all"]);
    refused("idx:d?shard=4/4", &["shard=4/4"]);
    refused("idx:d?pool=0.5..0.2", &["pool=0.5..0.2"]);
    refused("idx:d?rare=8", &["rare=8", "CLASS:SHARE"]);
    refused("idx:d?rare=8:0.6,3:0.6", &["less than 1"]);
    refused("idx:d?late=9", &["late=9", "CLASS@FRAME"]);
    refused("idx:d?rare=9:0.1&late=9@5", &["late=9@5", "isn't rare"]);
}

#[test]
fn roads_is_random_access_in_virtual_time() {
    let uri = "sim:roads?seed=3&late_from=100&start_ms=1000";
    let mut first = open(uri).expect("opens");
    let mut second = open(uri).expect("opens");
    for index in 0..12 {
        frame(first.as_mut(), index);
    }
    let (a, b) = (frame(first.as_mut(), 12), frame(second.as_mut(), 12));
    assert_eq!(a.pixels, b.pixels);
    assert_eq!(a.meta, b.meta);
    assert_eq!((a.meta.width, a.meta.height, a.meta.channels), (32, 32, 3));
    assert_eq!(a.meta.captured_ms, 1000 + 12 * FRAME_MS);
    assert_eq!(a.payload(), (Codec::Rgb8, &a.pixels[..]));
    assert_eq!(a.meta.seen_bytes, 3072);
    assert_eq!((first.id(), first.len()), (uri, None));
    let classes = first.classes();
    assert!((0..50).all(|i| classes.contains(&first.truth(i).expect("truth"))));
}

#[test]
fn idx_draws_by_share_and_reads_both_packings() {
    let folder = tempfile::tempdir().expect("folder");
    write_idx(folder.path(), "train", 200, true);
    write_idx(folder.path(), "t10k", 50, false);
    let base = format!("idx:{}", folder.path().display());
    let uri = format!("{base}?seed=5&rare=8:0.01,3:0.02&late=9@3000");
    let mut source = open(&uri).expect("opens");
    assert_eq!(source.classes().len(), 10);

    let before = shares(source.as_ref(), 0..3000);
    let after = shares(source.as_ref(), 3000..9000);
    assert!(!before.contains_key("9"));
    assert!((after["9"] - 0.97 / 8.0).abs() < 0.02, "{after:?}");
    assert!((after["8"] - 0.01).abs() < 0.005, "{after:?}");
    assert!((after["3"] - 0.02).abs() < 0.008, "{after:?}");
    assert!((before["0"] - 0.97 / 7.0).abs() < 0.03, "{before:?}");

    for index in [0, 7, 4000] {
        let got = frame(source.as_mut(), index);
        assert_eq!(
            (got.meta.width, got.meta.height, got.meta.channels),
            (4, 3, 1)
        );
        let label: u8 = source.truth(index).expect("truth").parse().expect("digit");
        assert_eq!(got.pixels[0], 20 * label);
        assert_eq!(u64::from(got.pixels[11]), got.meta.track);
        assert_eq!(got.payload().0, Codec::Gray8);
    }

    let balanced = open(&format!("{base}?split=test&mix=balanced&late=9@3000")).expect("opens");
    let even = shares(balanced.as_ref(), 0..3000);
    assert!(
        even.len() == 10 && even.values().all(|s| (s - 0.1).abs() < 0.03),
        "{even:?}"
    );

    refused(&format!("{base}?late=12@5"), &["late=12", "0, 1, 2"]);
    refused(
        &format!("{base}?late_from=5"),
        &["late_from", "late", "shard"],
    );
}

#[test]
fn shards_and_pools_share_nothing_and_miss_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    write_idx(folder.path(), "train", 200, false);
    let seen = |portion: &str| {
        let uri = format!("idx:{}?mix=balanced&{portion}", folder.path().display());
        let mut source = open(&uri).expect("opens");
        (0..4000)
            .map(|i| frame(source.as_mut(), i).meta.track)
            .collect::<std::collections::BTreeSet<_>>()
    };
    let parts = [
        "shard=0/2&pool=0..0.5",
        "shard=1/2&pool=0..0.5",
        "shard=0/2&pool=0.5..1",
        "shard=1/2&pool=0.5..1",
    ];
    let sets: Vec<_> = parts.iter().map(|part| seen(part)).collect();
    let total: usize = sets.iter().map(|set| set.len()).sum();
    assert!(sets.iter().all(|set| set.len() > 25), "a lopsided portion");
    let union: std::collections::BTreeSet<u64> = sets.into_iter().flatten().collect();
    assert_eq!((total, union.len()), (200, 200));
}

#[test]
fn damaged_idx_files_are_named() {
    let folder = tempfile::tempdir().expect("folder");
    write_idx(folder.path(), "train", 40, false);
    let base = format!("idx:{}", folder.path().display());
    let images = folder.path().join("train-images-idx3-ubyte");
    let whole = fs::read(&images).expect("read");
    fs::write(&images, &whole[..whole.len() - 1]).expect("write");
    refused(&base, &["train-images-idx3-ubyte", "cut short"]);
    fs::write(&images, &whole[..10]).expect("write");
    refused(&base, &["train-images-idx3-ubyte", "too short"]);
    fs::write(&images, &whole).expect("write");
    let labels = folder.path().join("train-labels-idx1-ubyte");
    fs::write(&labels, [0, 0, 8, 1, 0, 0, 0, 2, 1, 2]).expect("write");
    refused(
        &base,
        &["train-labels-idx1-ubyte", "2 labels for the 40 pictures"],
    );
    fs::remove_file(&labels).expect("remove");
    fs::write(
        folder.path().join("train-labels-idx1-ubyte.gz"),
        b"not gzip",
    )
    .expect("write");
    refused(&base, &["train-labels-idx1-ubyte.gz"]);
}

#[test]
fn a_listing_reads_each_file_once_and_names_the_bad_ones() {
    let folder = tempfile::tempdir().expect("folder");
    let root = folder.path();
    write_picture(&root.join("cat/a.png"), 1);
    write_picture(&root.join("deep/er/dog/b.JPG"), 2);
    write_picture(&root.join("cat/c.bmp"), 3);
    write_picture(&root.join("stray.png"), 4);
    fs::write(root.join("cat/d.jpg"), b"").expect("write");
    fs::write(root.join("cat/e.png"), b"\x89PNG\r\n\x1a\nand no more").expect("write");
    fs::write(root.join("cat/notes.txt"), b"ignored").expect("write");
    let mut source = open(&format!("dir:{}", root.display())).expect("opens");
    assert_eq!(source.len(), Some(6));
    assert_eq!(source.classes(), ["cat", "dog"]);

    let png = frame(source.as_mut(), 0);
    let file = fs::read(root.join("cat/a.png")).expect("read");
    assert_eq!(png.payload(), (Codec::Png, &file[..]));
    assert_eq!(png.meta.seen_bytes as usize, file.len());
    assert_eq!(
        (png.meta.width, png.meta.height, png.meta.channels),
        (8, 6, 3)
    );
    assert_eq!(png.pixels[..6], [1, 0, 0, 1, 9, 0]);
    let bmp = frame(source.as_mut(), 1);
    assert_eq!(
        (bmp.payload().0, bmp.meta.seen_bytes),
        (Codec::Rgb8, 8 * 6 * 3)
    );

    let mut buffer = FrameBuf::new();
    for (index, file, reason) in [(2, "d.jpg", "empty"), (3, "e.png", "")] {
        match source.read(index, &mut buffer).expect("readable") {
            Read::Skipped { name, why } => {
                assert!(
                    name.ends_with(file) && why.contains(reason),
                    "{name}: {why}"
                );
            }
            other => panic!("{file}: {other:?}"),
        }
    }
    assert_eq!(frame(source.as_mut(), 4).payload().0, Codec::Jpeg);
    let truths: Vec<Option<String>> = (0..7).map(|i| source.truth(i)).collect();
    let named = |class: &str| Some(class.to_owned());
    assert_eq!(
        truths,
        [
            named("cat"),
            named("cat"),
            named("cat"),
            named("cat"),
            named("dog"),
            None,
            None
        ]
    );
    assert_eq!(source.read(6, &mut buffer).expect("readable"), Read::End);
}

#[test]
fn pictures_of_all_sizes_are_read_and_a_jpeg_cut_short_is_not() {
    let folder = tempfile::tempdir().expect("folder");
    let root = folder.path();
    let sizes = [(1, 1), (40, 3), (7, 90)];
    for (i, (width, height)) in sizes.into_iter().enumerate() {
        let picture = image::RgbImage::from_pixel(width, height, image::Rgb([9, 99, 199]));
        picture.save(root.join(format!("{i}.jpg"))).expect("save");
    }
    let whole = fs::read(root.join("2.jpg")).expect("read");
    // A preview in an APP1 segment, as cameras write it, whose own end must not count.
    let preview = fs::read(root.join("0.jpg")).expect("read");
    let mut with_preview = vec![0xFF, 0xD8, 0xFF, 0xE1];
    with_preview.extend((preview.len() as u16 + 2).to_be_bytes());
    with_preview.extend(&preview);
    with_preview.extend(&whole[2..]);
    fs::write(root.join("3.jpg"), &with_preview).expect("write");
    let cut = &with_preview[..with_preview.len() - 2];
    fs::write(root.join("4.jpg"), cut).expect("write");
    let mut source = open(&format!("dir:{}", root.display())).expect("opens");
    for (index, size) in sizes.into_iter().chain([sizes[2]]).enumerate() {
        let meta = frame(source.as_mut(), index as u64).meta;
        assert_eq!((meta.width, meta.height), size);
    }
    let mut buffer = FrameBuf::new();
    match source.read(4, &mut buffer).expect("readable") {
        Read::Skipped { name, why } => assert!(name == "4.jpg" && why.contains("early"), "{why}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn folder_splits_go_by_content() {
    let folder = tempfile::tempdir().expect("folder");
    let root = folder.path();
    for i in 0..60 {
        write_picture(&root.join(format!("cat/{i:02}.png")), i);
        // The same picture again, elsewhere and under another name.
        write_picture(&root.join(format!("dog/copy-{i:02}.png")), i);
    }
    let contents = |split: &str| {
        let mut source = open(&format!("dir:{}?split={split}", root.display())).expect("opens");
        let n = source.len().expect("finite");
        (0..n)
            .map(|i| frame(source.as_mut(), i).encoded)
            .collect::<Vec<_>>()
    };
    let (train, test) = (contents("train"), contents("test"));
    assert_eq!(train.len() + test.len(), 120);
    assert!((8..=48).contains(&test.len()), "{} held out", test.len());
    assert!(test.iter().all(|picture| !train.contains(picture)));
}

#[test]
fn folder_streams_draw_by_share() {
    let folder = tempfile::tempdir().expect("folder");
    let root = folder.path();
    for i in 0..12 {
        for (c, class) in ["cat", "dog", "elk", "fox"].iter().enumerate() {
            write_picture(
                &root.join(format!("{class}/{i:02}.png")),
                (c * 12 + i) as u8,
            );
        }
    }
    let base = format!("dir:{}?stream=1", root.display());
    let mut source = open(&format!("{base}&rare=elk:0.05&late=fox@1000&seed=2")).expect("opens");
    let (before, after) = (
        shares(source.as_ref(), 0..1000),
        shares(source.as_ref(), 1000..4000),
    );
    assert!(!before.contains_key("fox"));
    assert!((after["fox"] - 0.95 / 3.0).abs() < 0.04, "{after:?}");
    assert!((after["elk"] - 0.05).abs() < 0.02, "{after:?}");
    let (once, again) = (frame(source.as_mut(), 77), frame(source.as_mut(), 77));
    assert_eq!((once.pixels, once.meta), (again.pixels, again.meta));
    assert_eq!(source.len(), None);
    refused(
        &format!("{base}&late=owl@3"),
        &["late=owl", "cat, dog, elk, fox"],
    );
    // Without a stream there are no shares to set.
    refused(
        &format!("dir:{}?rare=elk:0.05", root.display()),
        &["rare", "stream"],
    );
}

/// A folder of the shared data sets; None, saying so, where they are absent.
fn shared_data(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("FLYWHEEL_DATA").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data"),
        PathBuf::from,
    );
    let folder = root.join(name);
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("skipped: no {name} (set FLYWHEEL_DATA to the folder of shared data sets)");
    None
}

#[test]
fn mnist_streams() {
    let Some(folder) = shared_data("mnist_idx") else {
        return;
    };
    let uri = format!(
        "idx:{}?split=test&rare=8:0.005&late=9@500&shard=1/4",
        folder.display()
    );
    let mut source = open(&uri).expect("opens");
    assert_eq!(
        source.classes(),
        ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
    );
    let got = frame(source.as_mut(), 3);
    assert_eq!(
        (got.meta.width, got.meta.height, got.pixels.len()),
        (28, 28, 784)
    );
    assert!(
        got.pixels.iter().any(|&p| p > 128) && got.pixels.iter().filter(|&&p| p == 0).count() > 300
    );
    assert!((0..500).all(|i| source.truth(i).as_deref() != Some("9")));
    assert!((500..700).any(|i| source.truth(i).as_deref() == Some("9")));
}

#[test]
fn trashnet_lists_and_streams() {
    let Some(folder) = shared_data("trashnet_small/data") else {
        return;
    };
    let source = open(&format!("dir:{}", folder.display())).expect("opens");
    assert_eq!(source.len(), Some(2527));
    assert_eq!(
        source.classes(),
        ["cardboard", "glass", "metal", "paper", "plastic", "trash"]
    );
    let uri = format!(
        "dir:{}?stream=1&split=train&rare=trash:0.01&late=metal@50&shard=0/4",
        folder.display()
    );
    let mut stream = open(&uri).expect("opens");
    let got = frame(stream.as_mut(), 60);
    assert_eq!(
        (got.meta.width, got.meta.height, got.meta.channels),
        (150, 150, 3)
    );
    assert_eq!(got.payload().0, Codec::Jpeg);
    assert!((got.meta.seen_bytes as usize) < got.pixels.len());
}
