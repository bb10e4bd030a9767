//! `certs`: an authority, and certificates of it for the daemon and its clients, so that the daemon
//! can be reached over a network by those who have one and by nobody else.

use std::{
    io::Write as _,
    net::IpAddr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SerialNumber,
};
use shipway_fault::{Code, Fault, Result};

use crate::output;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// How long the authority is good for. Certificates end before it does.
const AUTHORITY_DAYS: u64 = 3650;
/// The authority's name. What tells one authority from another is its key.
const AUTHORITY: &str = "Shipway CA";

/// Make certificates for a daemon on a network and for its clients
///
/// DIR gets ca.pem and ca-key.pem, the authority, which is made once; daemon/ with what the daemon
/// is configured with; and client/ with what --tlsdir takes. Keep ca-key.pem where neither daemon
/// nor clients are. Files that exist stay, unless --force makes the pairs anew.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Directory of the files
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Name or address that clients reach the daemon by; may be repeated. Those of this machine, if
    /// there is none
    #[arg(long = "host", value_name = "NAME")]
    hosts: Vec<String>,
    /// Name of a client; may be repeated. Each has a directory of its own
    #[arg(long = "client", value_name = "NAME", default_value = "client")]
    clients: Vec<String>,
    /// Days that the certificates are valid
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u64).range(1..=AUTHORITY_DAYS))]
    days: u64,
    /// Make pairs anew that exist; the authority stays
    #[arg(long)]
    force: bool,
}

/// Whom a certificate is for.
enum Use<'a> {
    Daemon(&'a [String]),
    Client(&'a str),
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let hosts = if args.hosts.is_empty() { own_names() } else { args.hosts.clone() };
    for host in &hosts {
        check_host(host)?;
    }
    for client in &args.clients {
        check_client(client)?;
    }
    let directory = &args.directory;
    make_directory(directory)?;
    let authority = Authority::at(directory)?;
    let mut said = String::new();
    let pairs = std::iter::once(("daemon", Use::Daemon(&hosts)))
        .chain(args.clients.iter().map(|name| (name.as_str(), Use::Client(name))));
    for (name, what) in pairs {
        let at = directory.join(name);
        let is_there = at.join("cert.pem").exists() || at.join("key.pem").exists();
        if is_there && !args.force {
            said += &format!("{}: kept; --force makes it anew\n", at.display());
            continue;
        }
        let (cert, key) = authority.pair(&what, args.days)?;
        make_directory(&at)?;
        write(&at.join("ca.pem"), &authority.pem)?;
        write(&at.join("cert.pem"), &cert)?;
        write(&at.join("key.pem"), &key)?;
        let whom = match what {
            Use::Daemon(hosts) => hosts.join(", "),
            Use::Client(name) => format!("client {name}"),
        };
        said += &format!("{}: {whom}, valid for {} days\n", at.display(), args.days);
    }
    output::print(&said)
}

/// An authority, as its files say.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// That of a directory, made if there is none.
    fn at(directory: &Path) -> Result<Self> {
        let (cert, key) = (directory.join("ca.pem"), directory.join("ca-key.pem"));
        match (cert.exists(), key.exists()) {
            (false, false) => {
                let new = KeyPair::generate().map_err(failed)?;
                let params = Self::params()?;
                let pem = params.self_signed(&new).map_err(failed)?.pem();
                // The key first: a certificate without its key could not be told from one whose
                // key is kept elsewhere.
                write(&key, &new.serialize_pem())?;
                write(&cert, &pem)?;
                Ok(Self { pem, issuer: Issuer::new(params, new) })
            }
            (true, true) => {
                let broken =
                    |e| Fault::invalid(format!("{} is not a private key: {e}", key.display()));
                let issuer =
                    Issuer::new(Self::params()?, KeyPair::from_pem(&read(&key)?).map_err(broken)?);
                Ok(Self { pem: read(&cert)?, issuer })
            }
            (there, _) => {
                let (there, missing) = if there { (&cert, &key) } else { (&key, &cert) };
                let half = format!("{} exists and {} does not", there.display(), missing.display());
                Err(Fault::new(Code::FailedPrecondition, half)
                    .hint("bring it back, or choose another directory for another authority"))
            }
        }
    }

    fn params() -> Result<CertificateParams> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, AUTHORITY);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        validity(&mut params, AUTHORITY_DAYS)?;
        Ok(params)
    }

    /// A certificate and its key, as PEM.
    fn pair(&self, what: &Use<'_>, days: u64) -> Result<(String, String)> {
        let (names, common, usage) = match what {
            Use::Daemon(hosts) => (hosts.to_vec(), "shipwayd", ExtendedKeyUsagePurpose::ServerAuth),
            Use::Client(name) => (Vec::new(), *name, ExtendedKeyUsagePurpose::ClientAuth),
        };
        // Tells addresses from names.
        let mut params = CertificateParams::new(names).map_err(failed)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        validity(&mut params, days)?;
        let key = KeyPair::generate().map_err(failed)?;
        let cert = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok((cert.pem(), key.serialize_pem()))
    }
}

/// From an hour ago on, for clocks that are behind, and a serial number that no other one has.
fn validity(params: &mut CertificateParams, days: u64) -> Result<()> {
    let now = SystemTime::now();
    params.not_before = (now - HOUR).into();
    params.not_after = (now + DAY * u32::try_from(days).unwrap_or(u32::MAX)).into();
    let mut serial = shipway_host::random_bytes::<16>()?;
    // It is a number above zero.
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(())
}

fn failed(error: rcgen::Error) -> Fault {
    Fault::internal(format!("make a certificate: {error}"))
}

/// What this machine is called.
fn own_names() -> Vec<String> {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    if check_host(&name).is_ok() && !names.contains(&name) {
        names.push(name);
    }
    names
}

fn check_host(host: &str) -> Result<()> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let name = host.strip_prefix("*.").unwrap_or(host);
    if host.parse::<IpAddr>().is_ok() || (name.len() <= 253 && name.split('.').all(label)) {
        return Ok(());
    }
    Err(Fault::invalid(format!("--host {host:?} is neither a name nor an address"))
        .hint("give it without a scheme and a port: builder.example, 192.0.2.7"))
}

fn check_client(name: &str) -> Result<()> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"-_.@".contains(&b);
    // It is the name of a directory; others are taken.
    if !(1..=64).contains(&name.len())
        || !name.bytes().all(good)
        || name.starts_with(['.', '-'])
        || ["daemon", "ca.pem", "ca-key.pem"].contains(&name)
    {
        return Err(Fault::invalid(format!("--client {name:?} cannot be the name of a client"))
            .hint("up to 64 letters, digits, \"-\", \"_\", \".\" and \"@\", and not \"daemon\""));
    }
    Ok(())
}

fn make_directory(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| Fault::io(format!("create {}", path.display()), e))
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| Fault::io(format!("read {}", path.display()), e))
}

/// A file for its owner alone, which appears as a whole: a daemon that uses it may look at any
/// time.
fn write(path: &Path, text: &str) -> Result<()> {
    shipway_host::replace_file(path, 0o600, |file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    })
    .map_err(|e| Fault::io(format!("write {}", path.display()), e))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn args(directory: &Path, hosts: &[&str], clients: &[&str]) -> Args {
        let owned = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect();
        Args {
            directory: directory.to_owned(),
            hosts: owned(hosts),
            clients: owned(clients),
            days: 30,
            force: false,
        }
    }

    #[test]
    fn files_are_their_owners_and_stay_until_they_are_to_be_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("certs");
        let mut args = args(&at, &["builder.test", "192.0.2.7"], &["alice", "bob"]);
        run(&args).unwrap();
        let text = |name: &str| std::fs::read_to_string(at.join(name)).unwrap();
        let all = [
            "ca.pem",
            "ca-key.pem",
            "daemon/ca.pem",
            "daemon/cert.pem",
            "daemon/key.pem",
            "alice/cert.pem",
            "bob/key.pem",
        ];
        let before = all.map(text);
        for name in all {
            let mode = at.join(name).metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, 0o600, "{name}");
        }
        assert_eq!(at.join("alice").metadata().unwrap().permissions().mode() & 0o7777, 0o700);
        run(&args).unwrap();
        assert_eq!(all.map(text), before, "nothing is overwritten");
        std::fs::remove_dir_all(at.join("bob")).unwrap();
        run(&args).unwrap();
        assert_eq!(text("alice/cert.pem"), before[5], "only what is missing is made");
        assert!(at.join("bob/key.pem").exists());
        args.force = true;
        run(&args).unwrap();
        for (index, name) in all.iter().enumerate() {
            let same = text(name) == before[index];
            assert_eq!(same, name.contains("ca"), "{name}: the authority stays, pairs are new");
        }
        std::fs::remove_file(at.join("ca-key.pem")).unwrap();
        assert!(run(&args).unwrap_err().to_string().contains("ca-key.pem does not"));
        std::fs::write(at.join("ca-key.pem"), "no PEM").unwrap();
        assert!(run(&args).unwrap_err().to_string().contains("not a private key"));
    }

    #[test]
    fn names_that_cannot_be_are_refused_before_anything_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("certs");
        for host in ["", "tcp://builder", "builder:1234", "a b", "-a", "a..b", "é"] {
            let fault = run(&args(&at, &[host], &["client"])).unwrap_err();
            assert!(fault.to_string().contains("--host"), "{host}: {fault}");
        }
        for client in ["", "daemon", "../x", "a/b", ".x", "ca.pem", "-f"] {
            let fault = run(&args(&at, &["ok"], &[client])).unwrap_err();
            assert!(fault.to_string().contains("--client"), "{client}: {fault}");
        }
        assert!(!at.exists());
        for host in own_names().iter().map(String::as_str).chain(["*.example.org", "::1"]) {
            check_host(host).unwrap();
        }
    }
}
