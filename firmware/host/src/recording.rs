//! The life that the product image plays again: recorded from the scenario without power cuts.

use device_core::params::Params;
use device_core::spool::sim::NorSim;
use firmware_device::Failure;
use firmware_replay::{ERASE, Memory, Start, Summary, VALUES, replay};
use firmware_scenario::living::{key, live};
use firmware_scenario::vectors::{DEVICE, HARDWARE, ROOT, SCORES};
use flywheel_shared::trust::SignedRoot;

/// The recording.
pub fn make() -> Result<Vec<u8>, String> {
    let len = Params::len_f32(SCORES).map_err(|error| error.to_string())?;
    let mut values = vec![0.0; len];
    let params = Params::parse(SCORES, &mut values).map_err(|error| error.to_string())?;
    let mut inputs = Vec::new();
    let mut count = 0;
    let mut buffer = vec![0; 1 << 14];
    let mut text = String::new();
    let mut problem = None;
    live(&mut text, &params, &mut crate::flash(), &[], &mut |timed| {
        match postcard::to_slice(timed, &mut buffer) {
            Ok(bytes) => inputs.extend_from_slice(bytes),
            Err(error) => problem = Some(error.to_string()),
        }
        count += 1;
    })
    .map_err(|failure| failure.to_string())?;
    if let Some(problem) = problem {
        return Err(problem);
    }
    let start = Start {
        device: DEVICE
            .parse()
            .map_err(|error| format!("{DEVICE}: {error}"))?,
        key: key().to_bytes(),
        root: SignedRoot::from_bytes(ROOT).map_err(|error| error.to_string())?,
        scores: SCORES,
        inputs: count,
    };
    let start = postcard::to_slice(&start, &mut buffer).map_err(|error| error.to_string())?;
    Ok([&*start, &inputs].concat())
}

/// What the product image must print.
pub fn expected() -> Result<String, String> {
    let summary = play(&make()?).map_err(|failure| failure.to_string())?;
    Ok(summary
        .numbers()
        .map(|number| format!("{number} "))
        .concat())
}

fn play(recording: &[u8]) -> Result<Summary, Failure> {
    let mut cells = crate::flash();
    let memory = Memory {
        values: &mut [0.0; VALUES],
        identity: &mut None,
        device: &mut None,
    };
    let flash = NorSim::<4, ERASE>::new(&mut cells);
    replay(recording, HARDWARE, flash, memory, || 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replay_sends_what_the_recorded_device_sent() {
        let summary = play(&make().unwrap()).unwrap();
        assert_eq!(summary, play(&make().unwrap()).unwrap());
        let [
            frames,
            unscored,
            messages,
            acknowledged,
            flagged,
            spooled,
            live,
            ..,
        ] = summary.numbers();
        let line = expected().unwrap();
        assert!(frames > 1000 && unscored == 0 && live == 7, "{line}");
        assert!(flagged > 30 && messages > 30 && spooled == 0, "{line}");
        assert_eq!(acknowledged, flagged);
    }

    #[test]
    fn a_damaged_recording_is_an_error() {
        let recording = make().unwrap();
        assert!(play(&recording[..recording.len() - 1]).is_err());
    }
}
