fn main() {
    let é = 1;
}
fn main() {
    let é = 1;
}
fn main() {
    let é = 1;
}
