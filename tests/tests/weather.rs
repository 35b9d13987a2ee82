//! The simulator is as hard as it says: a model that has seen clear daylight only does visibly
//! worse at night and in fog.

use std::ops::ControlFlow;
use std::sync::Arc;

use anyhow::Result;
use cloud_trainer::{Example, TrainConfig};
use device_engine::{
    ClassOutput, EngineKind, Frame, InputSpec, ModelBytes, ModelSpec, Output, Task, preprocess,
};
use flywheel_models::NetConfig;
use flywheel_models::sim::{CLASSES, Conditions, Lighting, Mix, Roads, RoadsConfig, Weather};

const SIZE: u32 = 32;
/// Frames of one encounter: one of each is taken.
const STRIDE: u64 = flywheel_models::sim::FRAMES_PER_ENCOUNTER;

fn roads(seed: u64, conditions: Conditions) -> Result<Roads> {
    Ok(Roads::new(RoadsConfig {
        seed,
        size: SIZE,
        conditions,
        mix: Mix::Balanced,
        late_from: 0,
        ..RoadsConfig::default()
    })?)
}

#[test]
fn a_model_of_clear_days_does_worse_at_night_and_in_fog() -> Result<()> {
    let input = InputSpec {
        mean: [0.5; 3],
        std: [0.25; 3],
        ..InputSpec::new(SIZE as u16, SIZE as u16, 3)
    };
    let net = NetConfig {
        channels: 3,
        width: SIZE as usize,
        height: SIZE as usize,
        classes: CLASSES.len(),
        embedding: 64,
    };
    let mut days = roads(1, Conditions::ClearDay)?;
    let mut examples = Vec::new();
    for index in 0..1800 {
        let mut pixels = vec![0; days.frame_len()];
        let scene = days.render(index * STRIDE, &mut pixels)?;
        examples.push(Example {
            pixels: Arc::from(pixels),
            label: scene.class as u32,
            weight: 1.0,
        });
    }
    let mut config = TrainConfig::new(net, input, 3);
    config.steps = 350;
    let trained =
        cloud_trainer::train(&config, &examples, None, &mut |_| ControlFlow::Continue(()))?;

    let labels = CLASSES.join("\n");
    let spec = ModelSpec {
        arch: flywheel_models::ARCH,
        labels: &labels,
        input,
        embedding: 64,
        task: Task::Classify(ClassOutput::Logits),
    };
    let mut plan = device_engine::load(
        EngineKind::Tract,
        &ModelBytes {
            onnx: &trained.onnx,
            record: &trained.record,
            spec: &spec,
        },
    )?;
    let mut world = roads(2, Conditions::All)?;
    let mut pixels = vec![0; world.frame_len()];
    let mut tensor = vec![0.0; plan.input_len()];
    let mut logits = vec![0.0; plan.classes()];
    let mut embedding = vec![0.0; plan.embedding_dim()];
    // Right and all, of clear days, nights, and fog.
    let mut tally = [(0u32, 0u32); 3];
    for index in 0..3000 {
        let scene = world.render(index * STRIDE, &mut pixels)?;
        let frame = Frame {
            pixels: &pixels,
            width: SIZE,
            height: SIZE,
            channels: 3,
        };
        preprocess(&frame, &input, &mut tensor)?;
        plan.run(
            &tensor,
            &mut Output {
                logits: &mut logits,
                embedding: &mut embedding,
                heads: &mut [],
            },
        )?;
        let said = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
        let right = u32::from(said == Some(scene.class));
        let slices = [
            scene.lighting == Lighting::Day && scene.weather == Weather::Clear,
            scene.lighting == Lighting::Night,
            scene.weather == Weather::Fog,
        ];
        for (slot, member) in tally.iter_mut().zip(slices) {
            if member {
                slot.0 += right;
                slot.1 += 1;
            }
        }
    }
    let [day, night, fog] = tally.map(|(right, all)| f64::from(right) / f64::from(all));
    println!("clear day {day:.3}, night {night:.3}, fog {fog:.3}");
    assert!(
        day > 0.6,
        "clear day {day:.3}: the model learnt too little to tell"
    );
    assert!(night < day - 0.06, "night {night:.3} against {day:.3}");
    assert!(fog < day - 0.06, "fog {fog:.3} against {day:.3}");
    Ok(())
}
