group "default" {
  targets = ["app", "tools"]
}

group "tools" {
  description = "What is run by hand"
  targets     = ["lint", "docs"]
}

target "_common" {
  args       = { VERSION = "1.0", DEBUG = null }
  labels     = { "org.example.team" = "core" }
  platforms  = ["linux/amd64", "linux/arm64"]
  cache-from = ["type=registry,ref=example.org/cache"]
  tags       = ["common"]
}

target "_debug" {
  args       = { DEBUG = "1" }
  cache-from = ["example.org/debug", "type=registry,ref=example.org/cache"]
  no-cache-filter = ["build"]
}

target "app" {
  description = "The program"
  inherits    = ["_common", "_debug"]
  context     = "./app/"
  args        = { VERSION = "1.1" }
  tags        = ["example.org/app:1", "example.org/app:1", "example.org/app:latest"]
  output      = ["type=image,push=true", { type = "local", dest = "out" }]
  secret      = ["id=token,env=TOKEN", { id = "key", env = "KEY" }]
  attest      = ["type=provenance,mode=max", { type = "sbom", disabled = "true" }]
  network     = "host"
  pull        = true
}

target "lint" {
  inherits  = ["_common"]
  platforms = []
  output    = ["type=cacheonly"]
}

target "docs" {
  dockerfile-inline = <<-EOT
    FROM scratch
      COPY . /
    ENV HOME=$${HOME}
  EOT
}
