//! Which engines can be tested here: all of this build, but ONNX Runtime only where its library is
//! named.

use device_engine::{EngineKind, onnx_runtime};

/// The engines of this build, less what cannot be had, which is said.
pub fn here() -> Vec<EngineKind> {
    let usable = |kind: &EngineKind| {
        if *kind != EngineKind::Ort {
            return true;
        }
        let named = std::env::var_os(onnx_runtime::VARIABLE).is_some();
        match onnx_runtime::open(None) {
            Ok(()) => true,
            Err(error) if named => panic!("{error}"),
            Err(error) => {
                eprintln!("skipped: {error}");
                false
            }
        }
    };
    EngineKind::ALL.iter().copied().filter(usable).collect()
}

/// Those of them that run ONNX files.
#[allow(dead_code, reason = "each test uses its part")]
pub fn of_onnx() -> impl Iterator<Item = EngineKind> {
    let runs = |kind: &EngineKind| matches!(kind, EngineKind::Tract | EngineKind::Ort);
    here().into_iter().filter(runs)
}
