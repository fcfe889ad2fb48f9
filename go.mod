module whatsapp-contact-processor

go 1.26

require github.com/rs/cors v1.11.1
