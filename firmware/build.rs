//! Tells the linker where an image's memory map is, for the image only: on a host there is none.
//! Arguments are given here and not in `.cargo/config` because `RUSTFLAGS` in the environment would
//! silently replace those.

fn main() {
    println!("cargo:rerun-if-changed=memory.x");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return;
    }
    // From where this build writes, since a checkout in another place reuses what it finds there.
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR for build scripts");
    std::fs::copy("memory.x", format!("{out}/memory.x"))
        .expect("the package has a memory.x, and cargo's output folder can be written");
    // cortex-m-rt asks for the names of interrupt handlers here; the board has none.
    std::fs::write(format!("{out}/device.x"), "").expect("cargo's output folder can be written");
    println!("cargo:rustc-link-search={out}");
    println!("cargo:rustc-link-arg-bins=-Tlink.x");
}
