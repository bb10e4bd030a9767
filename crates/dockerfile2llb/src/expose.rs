//! EXPOSE: ports, ranges and protocols (row `df.expose`).

use crate::{
    error::{ConvertError, Result},
    instruct::StageContext,
    stage::{OpenStage, Vars},
    text,
};
use shipway_dockerfile::{Finding, Lines};
use shipway_gocompat::quote;
use std::net::IpAddr;

impl StageContext<'_> {
    pub fn expose(&mut self, stage: &mut OpenStage, lines: Lines, words: &[String]) -> Result<()> {
        let mut ports = Vec::new();
        for word in words {
            for written in self.plan.lex.words(word, &Vars(stage.state.env()))? {
                ports.extend(self.port(&written, lines)?);
            }
        }
        for port in &ports {
            stage.image.config.exposed_ports.insert(port.clone(), shipway_oci::Member);
        }
        stage.commit(format!("EXPOSE {}", text::list(&ports)), false, self.plan.globals.epoch);
        Ok(())
    }

    /// `[[ip:]host:]container[/protocol]`, where only the container's part means anything.
    fn port(&mut self, written: &str, lines: Lines) -> Result<Vec<String>> {
        let mut parts = written.rsplitn(3, ':');
        let container = parts.next().unwrap_or_default();
        let (host, ip) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let (port, protocol) = container.split_once('/').unwrap_or((container, ""));
        let invalid =
            |why: &str| ConvertError::new(format!("invalid port: {}: {why}", quote(written)));
        if port.is_empty() {
            return Err(invalid("no port specified"));
        }
        let lower = protocol.to_lowercase();
        let lower = match lower.as_str() {
            "" => "tcp",
            known @ ("tcp" | "udp" | "sctp") => known,
            _ => return Err(invalid(&format!("invalid proto: {protocol}"))),
        };
        if protocol != protocol.to_lowercase() {
            self.report(Finding::ExposeProtoCasing { port: written }, lines);
        }
        if !ip.is_empty() || !host.is_empty() {
            self.report(Finding::ExposeInvalidFormat { port: written }, lines);
        }
        let bare = ip.strip_prefix('[').and_then(|i| i.strip_suffix(']')).unwrap_or(ip);
        if !bare.is_empty() && bare.parse::<IpAddr>().is_err() {
            return Err(ConvertError::new(format!("invalid IP address: {bare}")));
        }
        let (first, last) = range(port)
            .ok_or_else(|| ConvertError::new(format!("invalid containerPort: {port}")))?;
        if !host.is_empty() {
            let (from, to) = range(host)
                .ok_or_else(|| ConvertError::new(format!("invalid hostPort: {host}")))?;
            if last - first != to - from && first != last {
                let message = format!(
                    "invalid ranges specified for container and host Ports: {port} and {host}"
                );
                return Err(ConvertError::new(message));
            }
        }
        Ok((first..=last).map(|n| format!("{n}/{lower}")).collect())
    }
}

fn range(text: &str) -> Option<(u16, u16)> {
    let number = |t: &str| t.parse::<u16>().ok();
    match text.split_once('-') {
        None => number(text).map(|n| (n, n)),
        Some((a, b)) => {
            let (a, b) = (number(a)?, number(b)?);
            (a <= b).then_some((a, b))
        }
    }
}
