//! scratch
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use cloud_trainer::{Augment, Champion, Example, TrainConfig, Trained, train};
use device_engine::{EngineKind, Frame, InputSpec, ModelBytes, ModelSpec, Output, load, preprocess};
use flywheel_models::sim::{CLASSES, Conditions, LATE, Mix, RARE, Roads, RoadsConfig};
use flywheel_models::{ARCH, NetConfig};

fn env<T: std::str::FromStr>(name: &str, default: T) -> T {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn cpu_s() -> f32 {
    let s = std::fs::read_to_string("/proc/self/stat").unwrap();
    let f: Vec<&str> = s.rsplit(')').next().unwrap().split_whitespace().collect();
    (f[11].parse::<f32>().unwrap() + f[12].parse::<f32>().unwrap()) / 100.0
}

fn gather(seed: u64, conditions: Conditions, per_class: &dyn Fn(usize) -> usize) -> Vec<Example> {
    let mut roads = Roads::new(RoadsConfig { seed, conditions, mix: Mix::Balanced, late_from: 0, ..RoadsConfig::default() }).unwrap();
    let mut left: Vec<usize> = (0..CLASSES.len()).map(per_class).collect();
    let mut out = Vec::new();
    let mut encounter = 0u64;
    let mut rgb = vec![0; roads.frame_len()];
    while left.iter().any(|n| *n > 0) {
        let frame = encounter * 5 + encounter % 5;
        encounter += 1;
        let scene = roads.scene(frame);
        if left[scene.class] == 0 { continue; }
        left[scene.class] -= 1;
        roads.render(frame, &mut rgb).unwrap();
        out.push(Example { pixels: Arc::from(&rgb[..]), label: scene.class as u32, weight: 1.0 });
    }
    out
}

fn eval(config: &TrainConfig, t: &Trained, set: &[Example]) -> (f32, f32, f32, f32, Vec<f32>) {
    let labels = CLASSES.join("\n");
    let spec = ModelSpec { arch: ARCH, labels: &labels, input: config.input, embedding: 64 };
    let mut plan = load(EngineKind::Tract, &ModelBytes { onnx: &t.onnx, record: &t.record, spec: &spec }).unwrap();
    let mut input = vec![0.0; plan.input_len()];
    let n = CLASSES.len();
    let (mut hit, mut all) = (vec![0f32; n], vec![0f32; n]);
    let mut time = 0.0;
    for e in set {
        let side = config.net.width as u32;
        preprocess(&Frame { pixels: &e.pixels, width: side, height: side, channels: 3 }, &config.input, &mut input).unwrap();
        let mut logits = vec![0.0; n];
        let mut embedding = vec![0.0; 64];
        let at = Instant::now();
        plan.run(&input, &mut Output { logits: &mut logits, embedding: &mut embedding }).unwrap();
        time += at.elapsed().as_secs_f32();
        let best = (0..n).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        all[e.label as usize] += 1.0;
        if best == e.label as usize { hit[best] += 1.0; }
    }
    let recall: Vec<f32> = hit.iter().zip(&all).map(|(h, a)| h / a.max(1.0)).collect();
    let balanced = recall.iter().sum::<f32>() / n as f32;
    let rare = RARE.iter().map(|c| recall[*c]).sum::<f32>() / RARE.len() as f32;
    (balanced, rare, recall[LATE], 1e6 * time / set.len() as f32, recall)
}

#[test]
#[ignore]
fn scratch() {
    let net = NetConfig { channels: 3, width: 32, height: 32, classes: CLASSES.len(), embedding: 64 };
    println!("classes {} rare {:?} late {} MAC {} features {}", CLASSES.len(), RARE, LATE, net.macs(), net.features());
    let input = InputSpec { width: 32, height: 32, channels: 3, mean: [0.45; 3], std: [0.25; 3] };
    let a = env("AUG", 1.0f32);
    let base = TrainConfig {
        batch: env("BATCH", 64),
        shards: env("SHARDS", 2),
        lr: env("LR", 3e-3),
        weight_decay: env("WD", 0.05),
        label_smoothing: env("LS", 0.05),
        ema: env("EMA", 0.98),
        clip: env("CLIP", 2.0),
        balance: env("BAL", 0.75),
        augment: Augment { geometry: env("AG", a), light: env("AL", a), optics: env("AO", a), occlusion: env("AOC", a), mirror: false },
        ..TrainConfig::new(net, input, env("SEED", 1))
    };
    let run = |config: &TrainConfig, set: &[Example], champion: Option<&Trained>, name: &str| {
        let at = Instant::now();
        let cpu = cpu_s();
        let mut last = None;
        let t = train(config, set, champion.map(|c| Champion { record: &c.record, config: &config.net }), &mut |p| { last = Some(p); ControlFlow::Continue(()) }).unwrap();
        let s = at.elapsed().as_secs_f32();
        let cpu = cpu_s() - cpu;
        println!("{name}: {} examples, {} steps, {s:.1} s, cpu {cpu:.1} s = {:.2} ms/img, {:.0} img/s, loss {:.3} acc {:.3} clean {:.3}", set.len(), config.steps, 1e3 * cpu / (config.steps * config.batch) as f32, (config.steps * config.batch) as f32 / s, t.loss, last.unwrap().accuracy, t.train_accuracy);
        t
    };
    let test = gather(999, Conditions::All, &|_| env("TEST", 60));
    let is_special = |c: usize| RARE.contains(&c) || c == LATE;
    let n_boot = env("BOOT", 110);
    let boot = gather(1, Conditions::ClearDay, &|c| if c == LATE { 0 } else if is_special(c) { 3 } else { n_boot });
    let show = |name: &str, c: &TrainConfig, t: &Trained| {
        let (b, r, l, us, recall) = eval(c, t, &test);
        println!("   {name}: balanced {b:.3} rare {r:.3} late {l:.3} tract {us:.0} us  {:?}", recall.iter().map(|v| (v * 100.0) as u32).collect::<Vec<_>>());
    };
    if env("SPEED", 0) == 1 {
        let c = TrainConfig { steps: env("STEPS", 20), ..base.clone() };
        let t = run(&c, &boot, None, "speed");
        show("speed", &c, &t);
        return;
    }
    let c0 = TrainConfig { steps: env("STEPS0", 400), ..base.clone() };
    let t0 = run(&c0, &boot, None, "R0");
    show("R0", &c0, &t0);
    if env("ONLY0", 0) == 1 { return; }
    let mut extra = gather(2, Conditions::All, &|_| 600usize.div_ceil(CLASSES.len()));
    // 2 % mislabels, deterministic.
    for i in (0..extra.len()).step_by(50) { extra[i].label = (extra[i].label + 5) % CLASSES.len() as u32; }
    let rounds: usize = env("ROUNDS", 3);
    let mut champion = t0;
    for round in 1..=rounds {
        let take = extra.len() * round / rounds;
        let mut set = boot.clone();
        let w: f32 = env("NEWW", 1.0);
        set.extend(extra[..take].iter().cloned().map(|mut e| { e.weight = w; e }));
        let c = TrainConfig { steps: env("STEPS", 300), lr: env("LR1", base.lr), seed: base.seed + round as u64, ..base.clone() };
        let from = if env("SCRATCH", 0) == 1 { None } else { Some(&champion) };
        let t = run(&c, &set, from, &format!("R{round}"));
        show(&format!("R{round}"), &c, &t);
        champion = t;
    }
}
