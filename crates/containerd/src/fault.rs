//! Owns the translation of containerd's gRPC statuses to faults.

use shipway_fault::{Class, Code, Fault};
use std::{error::Error, io, path::Path};
use tonic::Status;

/// The fault of `status`, which answered `what` at `address`.
pub(crate) fn from_status(what: &str, address: &Path, status: &Status) -> Fault {
    let message = status.message();
    // Statuses that containerd sent have no source; those with one were made here, of a broken
    // connection. We never cancel a call and look at its answer, so a cancelled one means that
    // containerd is going away.
    let broken = status.source().is_some()
        || matches!(status.code(), tonic::Code::Unavailable | tonic::Code::Cancelled);
    if broken && !is_locked(message) {
        let cause = root_cause(status);
        return Fault::unavailable(format!(
            "{what}: no connection to containerd at {}: {cause}",
            address.display()
        ))
        .hint(format!("is containerd running at {}?", address.display()));
    }
    if message.contains("no space left on device") || message.contains("disk quota exceeded") {
        return Fault::new(Code::ResourceExhausted, format!("{what}: containerd: {message}"))
            .with_class(Class::Environment)
            .with_source(io::Error::from(io::ErrorKind::StorageFull))
            .hint("the disk is full: free some space, for example with `shipway prune`, and build again");
    }
    let code = Code::from_number(status.code() as i32);
    let fault = Fault::new(code, format!("{what}: containerd: {message}"));
    match code {
        Code::NotFound | Code::AlreadyExists => fault,
        // A wrong request to containerd is ours, not the user's.
        Code::InvalidArgument | Code::OutOfRange | Code::Internal | Code::DataLoss => {
            fault.with_class(Class::Internal)
        }
        _ => fault.with_class(Class::Environment),
    }
}

/// Two ingests with one reference; containerd calls that unavailable.
fn is_locked(message: &str) -> bool {
    message.contains("locked")
}

fn root_cause(status: &Status) -> String {
    let mut cause: Option<&(dyn Error + 'static)> = status.source();
    let mut text = status.message().to_owned();
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(status: Status, code: Code, class: Class, says: &str) {
        let fault = from_status("stat snapshot \"a\"", Path::new("/run/c.sock"), &status);
        assert_eq!((fault.code(), fault.class()), (code, class), "{fault:?}");
        assert!(format!("{fault:?}").contains(says), "{fault:?}");
        assert!(fault.to_string().starts_with("stat snapshot"), "{fault:?}");
    }

    #[test]
    fn statuses_become_faults_that_say_what_to_do() {
        check(
            Status::not_found("snapshot a: not found"),
            Code::NotFound,
            Class::User,
            "snapshot a: not found",
        );
        check(
            Status::unavailable("gone"),
            Code::Unavailable,
            Class::Environment,
            "is containerd running at /run/c.sock?",
        );
        check(
            Status::cancelled("context canceled"),
            Code::Unavailable,
            Class::Environment,
            "is containerd running",
        );
        check(Status::unavailable("ref x locked"), Code::Unavailable, Class::Environment, "locked");
        check(
            Status::unknown("write /x: no space left on device"),
            Code::ResourceExhausted,
            Class::Environment,
            "prune",
        );
        check(
            Status::invalid_argument("empty key"),
            Code::InvalidArgument,
            Class::Internal,
            "empty key",
        );
        let broken =
            Status::from_error(Box::new(std::io::Error::from(std::io::ErrorKind::ConnectionReset)));
        check(broken, Code::Unavailable, Class::Environment, "connection reset");
    }
}
