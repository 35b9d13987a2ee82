//! Tells the linker where the memory map is. Arguments are given here and not in `.cargo/config`
//! because `RUSTFLAGS` in the environment would silently replace those.

fn main() {
    // From where this build writes, since a checkout in another place reuses what it finds there.
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR for build scripts");
    std::fs::write(format!("{out}/memory.x"), include_str!("memory.x"))
        .expect("cargo's output folder can be written");
    println!("cargo:rustc-link-search={out}");
    println!("cargo:rustc-link-arg-bins=-Tlink.x");
    println!("cargo:rerun-if-changed=memory.x");
    println!("cargo:rerun-if-changed=build.rs");
}
