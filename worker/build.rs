//! Compiles the C++ face of c10d when the feature `torch` is on, and does nothing otherwise.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "torch")]
    if let Err(why) = torch() {
        println!("cargo::error={why}");
    }
}

#[cfg(feature = "torch")]
fn torch() -> Result<(), String> {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-changed=src/torch/cpp");
    let libtorch = std::env::var("LIBTORCH").unwrap_or_default();
    let reducer = format!("{libtorch}/include/torch/csrc/distributed/c10d/reducer.hpp");
    if libtorch.is_empty() || !std::path::Path::new(&reducer).exists() {
        return Err(
            "the feature `torch` needs libtorch: run scripts/build.sh, or set LIBTORCH to what scripts/fetch-libtorch.sh prints".into()
        );
    }
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .files(["attention", "c10d", "kernels", "memory"].map(|name| format!("src/torch/cpp/{name}.cpp")))
        .include("src/torch/cpp")
        .flag("-isystem")
        .flag(format!("{libtorch}/include"))
        .flag("-isystem")
        .flag(format!("{libtorch}/include/torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .define("USE_DISTRIBUTED", None)
        .define("USE_C10D_GLOO", None)
        // Nobody looks at errno or at floating-point traps, and loops become vectors.
        .opt_level(3)
        .flag("-fno-math-errno")
        .flag("-fno-trapping-math")
        // Vectors are only passed inside of a file.
        .flag("-Wno-psabi")
        .debug(false)
        .try_compile("everlit_c10d")
        .map_err(|error| format!("the C++ part did not compile: {error}"))?;
    println!("cargo::rustc-link-search=native={libtorch}/lib");
    println!("cargo::rustc-link-lib=dylib=torch_cpu");
    println!("cargo::rustc-link-lib=dylib=c10");
    // torch-sys gives executables no path to libtorch. Agent and shim need none: nothing of libtorch is in them.
    println!("cargo::rustc-link-arg-bin=everlit-worker=-Wl,-rpath,{libtorch}/lib");
    Ok(())
}
