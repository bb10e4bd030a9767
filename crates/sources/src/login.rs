//! User and password in the address of a source: taken out of it, and shown nowhere.

use base64::{Engine, prelude::BASE64_STANDARD};
use http::HeaderValue;
use percent_encoding::percent_decode_str;
use shipway_fault::{Fault, Result};
use std::fmt;

/// User and password, encoded for a header. Not shown by mistake.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Login(pub String);

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Login(…)")
    }
}

impl Login {
    /// The header's value.
    pub(crate) fn header(&self) -> Result<HeaderValue> {
        let failed =
            |_| Fault::invalid("the user and password of an address cannot be sent as a header");
        let mut value = HeaderValue::try_from(format!("Basic {}", self.0)).map_err(failed)?;
        value.set_sensitive(true);
        Ok(value)
    }
}

/// The address without what is secret, and what that was: git's command line can be read by
/// every process on this machine, and its configuration stays. A user of SSH is not secret, and a
/// password has no use there.
pub(crate) fn split_login(address: &str) -> (String, Option<Login>) {
    let Some((scheme, rest)) = address.split_once("://") else { return (address.to_owned(), None) };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let Some((user, host)) = rest[..end].rsplit_once('@') else {
        return (address.to_owned(), None);
    };
    let (name, password) = user.split_once(':').unwrap_or((user, ""));
    if !scheme.to_lowercase().starts_with("http") {
        return (format!("{scheme}://{name}@{host}{}", &rest[end..]), None);
    }
    let login =
        [percent_decode_str(name).collect(), percent_decode_str(password).collect::<Vec<u8>>()]
            .join(&b':');
    (format!("{scheme}://{host}{}", &rest[end..]), Some(Login(BASE64_STANDARD.encode(login))))
}
