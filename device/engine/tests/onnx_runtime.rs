//! ONNX Runtime's library named wrongly; in a process of its own, since one that loads serves it all.
#![cfg(feature = "ort")]

use std::path::Path;

use device_engine::{EngineError, onnx_runtime};

#[test]
fn what_is_no_onnx_runtime_is_refused_with_its_name_and_the_mend() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("libonnxruntime.so");
    std::fs::write(&text, "not a library").unwrap();
    for (library, why) in [
        (Path::new("nowhere/libonnxruntime.so"), "No such file"),
        (&text, "libonnxruntime.so"),
        // A library, but another one.
        (Path::new("libc.so.6"), "OrtGetApiBase"),
    ] {
        let error = onnx_runtime::open(Some(library)).unwrap_err();
        assert!(matches!(error, EngineError::Missing { engine: "ort", .. }));
        let text = error.to_string();
        for part in [&*library.to_string_lossy(), why, "ort_library", "1.17"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }
}
