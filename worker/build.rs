//! Compiles the C++ face of libtorch when the feature `torch` is on (with CUDA and NCCL under `nccl`), and does nothing otherwise.

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
    let cuda = cuda()?;
    let mut build = cc::Build::new();
    if let Some(cuda) = &cuda {
        build.define("USE_C10D_NCCL", None);
        for headers in ["cuda", "nccl", "more", "cuda/cccl", "more/cccl"] {
            build.flag("-isystem").flag(format!("{cuda}/{headers}"));
        }
    }
    build
        .cpp(true)
        .std("c++17")
        .files(["attention", "c10d", "cuda", "kernels", "memory"].map(|name| format!("src/torch/cpp/{name}.cpp")))
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
    if let Some(cuda) = &cuda {
        println!("cargo::rustc-link-search=native={cuda}/lib");
        println!("cargo::rustc-link-lib=dylib=torch_cuda");
        println!("cargo::rustc-link-lib=dylib=c10_cuda");
        println!("cargo::rustc-link-lib=dylib:+verbatim=libcudart.so.13");
        // What those need is found by them when the program starts.
        println!("cargo::rustc-link-arg-bin=everlit-worker=-Wl,--allow-shlib-undefined");
        // First, so that every part of libtorch comes from one place.
        println!("cargo::rustc-link-arg-bin=everlit-worker=-Wl,-rpath,{cuda}/lib");
    }
    // torch-sys gives executables no path to libtorch. Agent and shim need none: nothing of libtorch is in them.
    println!("cargo::rustc-link-arg-bin=everlit-worker=-Wl,-rpath,{libtorch}/lib");
    Ok(())
}

/// The CUDA build of the same libtorch, when the feature `nccl` is on.
#[cfg(feature = "torch")]
fn cuda() -> Result<Option<String>, String> {
    println!("cargo::rerun-if-env-changed=EVERLIT_LIBTORCH_CUDA");
    if std::env::var_os("CARGO_FEATURE_NCCL").is_none() {
        return Ok(None);
    }
    let place = std::env::var("EVERLIT_LIBTORCH_CUDA").unwrap_or_default();
    let needed = ["lib/libtorch_cuda.so", "cuda/cuda_runtime_api.h", "nccl/nccl.h"];
    if place.is_empty() || needed.iter().any(|path| !std::path::Path::new(&place).join(path).exists()) {
        return Err(
            "the feature `nccl` needs the CUDA build of libtorch: run scripts/build.sh --cuda, or set EVERLIT_LIBTORCH_CUDA to what scripts/fetch-libtorch-cuda.sh prints"
                .into(),
        );
    }
    Ok(Some(place))
}
