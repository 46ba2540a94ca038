//! Generates the protobuf messages; needs no `protoc`.

fn main() {
    println!("cargo::rerun-if-changed=proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .input("proto/xplane.proto")
        .cargo_out_dir("proto")
        .run_from_script();
}
