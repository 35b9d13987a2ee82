//! A frame that is not flagged costs no heap allocation outside the engine, whatever runs it and
//! wherever it comes from, with limits, capture thread and metrics. Measured with a counting
//! allocator on the production frame loop.

#[allow(dead_code, reason = "each test uses its part")]
mod virtual_time;

use std::fs;
use std::path::Path;

use flywheel_agent::allocations::{Counting, of_this_thread};
use flywheel_agent::bench::{BenchArgs, Engines, Measured, measure, open_model};
use flywheel_agent::clock::cpu_us;
use flywheel_agent::shared::lock;
use image::{ImageFormat, RgbImage};
use virtual_time::{Cost, Device, Setup, World};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn the_counter_counts_this_thread() {
    let before = of_this_thread();
    let mut list = std::hint::black_box(vec![1u8]);
    list.reserve_exact(std::hint::black_box(1000));
    std::thread::spawn(|| drop(std::hint::black_box(Box::new([7u8; 32]))))
        .join()
        .unwrap();
    let taken = of_this_thread() - before;
    // Two of the list; the thread's handle and result take some, its own box is not ours.
    assert!((3..20).contains(&taken), "{taken}");
    drop(list);
    assert_eq!(of_this_thread() - before, taken);
}

/// Every engine on a source, with the built-in network of 32×32×3.
fn run(source: &str, fps: Option<f32>) -> Vec<(&'static str, Measured)> {
    let args = BenchArgs {
        model: None,
        engine: Engines::All,
        ort_library: None,
        frames: 400,
        source: Some(source.to_owned()),
        fps,
        profile: false,
        json: false,
        stdin: false,
        export: None,
    };
    let report = measure(&args, &open_model(None).unwrap()).unwrap();
    report
        .engines
        .into_iter()
        // ONNX Runtime is there only where its library is named.
        .filter(|engine| engine.engine != "ort" || engine.measured.is_some())
        .map(|engine| (engine.engine, engine.measured.expect(engine.engine)))
        .collect()
}

fn check(source: &str, fps: Option<f32>) {
    let engines = run(source, fps);
    assert!(engines.len() >= 3);
    for (engine, measured) in engines {
        assert!(measured.golden, "{engine}: {:?}", measured.golden_error);
        // Both kinds of frames were seen, and more than lie between two saves of the position.
        assert!(measured.flagged > 0, "{engine} on {source}");
        assert!(measured.frames - measured.flagged > 200);
        let counted = measured.allocations.unwrap();
        assert_eq!(counted.outside_unflagged_max, 0, "{engine} on {source}");
        assert_eq!(counted.outside_unflagged, 0.0);
        assert_eq!(counted.score_trigger_max, 0);
        assert_eq!(counted.source, 0.0, "{engine} on {source}");
        // The engines do allocate, which shows that the counting works.
        assert!(counted.engine + counted.other_threads > 1.0);
    }
}

fn idx(rank: u8, dims: &[u32], data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, rank];
    bytes.extend(dims.iter().flat_map(|dim| dim.to_be_bytes()));
    bytes.extend_from_slice(data);
    bytes
}

fn noise(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|i| ((i * 73 + seed * 151) * 37 % 251) as u8)
        .collect()
}

#[test]
fn frames_of_an_idx_set_allocate_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
    // Grey and of another size, so that frames are resized and spread over three channels.
    let pixels: Vec<u8> = (0..60).flat_map(|seed| noise(28 * 28, seed)).collect();
    let labels: Vec<u8> = (0..60).map(|i| i % 10).collect();
    write("train-images-idx3-ubyte", &idx(3, &[60, 28, 28], &pixels));
    write("train-labels-idx1-ubyte", &idx(1, &[60], &labels));
    check(&format!("idx:{}?seed=1", folder.path().display()), None);
}

fn picture(path: &Path, width: u32, height: u32, seed: usize) {
    let pixels = noise(3 * width as usize * height as usize, seed);
    let picture = RgbImage::from_raw(width, height, pixels).unwrap();
    picture.save_with_format(path, ImageFormat::Png).unwrap();
}

#[test]
fn frames_of_photographs_that_were_decoded_before_allocate_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for (seed, (width, height)) in [(150, 150), (32, 32), (64, 20), (20, 90)]
        .into_iter()
        .enumerate()
    {
        let path = folder.path().join(format!("{seed}.png"));
        picture(&path, width, height, seed);
    }
    let source = format!("dir:{}?stream=1&seed=3", folder.path().display());
    check(&source, None);
}

#[test]
fn frames_of_a_capture_thread_allocate_nothing() {
    check("sim:roads?seed=1&size=32", Some(2000.0));
}

#[test]
fn a_device_behind_its_camera_and_at_its_limits_allocates_nothing() {
    // A frame takes longer than the camera's pause, so that some are given up; the limit on the
    // processor gives up more.
    let mut device = Device::new(&Setup {
        frames: 20_000,
        bad_every: 0,
        waiting: 4,
        quota: 100_000_000,
        live: Cost {
            us: 40_000,
            stall_every: 0,
            stall_us: 0,
            fails_at: None,
            panics_at: None,
        },
        extra: "max_cpu = 0.9\nmax_fps = 24",
    });
    let (mut unflagged, mut flagged) = (0u64, 0u64);
    loop {
        let looked = World::get(&device.world.looked[0]);
        let records = lock(&device.shared.spool).usage().records;
        let before = of_this_thread();
        let more = device.turn();
        let taken = of_this_thread() - before;
        if !more {
            break;
        }
        if World::get(&device.world.looked[0]) == looked {
            let warm = unflagged >= 100;
            assert!(!warm || taken == 0, "{taken} waiting after frame {looked}");
        } else if lock(&device.shared.spool).usage().records > records {
            flagged += 1;
        } else {
            unflagged += 1;
            // The first ones make the buffers.
            assert!(unflagged < 100 || taken == 0, "{taken} by frame {looked}");
        }
    }
    let metrics = &device.shared.metrics;
    assert_eq!(metrics.seen.get(), unflagged + flagged);
    assert!(
        flagged > 100 && unflagged > 10_000,
        "{flagged}, {unflagged}"
    );
    assert!(metrics.dropped.get() > 1_000, "{}", metrics.dropped.get());
}

#[test]
fn the_processor_time_is_read_without_allocating() {
    let before = of_this_thread();
    let used = cpu_us();
    assert_eq!(of_this_thread(), before);
    std::hint::black_box(used);
}
